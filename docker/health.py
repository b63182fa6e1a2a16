"""Ask a server in this container how it is, without curl: exit code 0 when it is well, 1 with one line when not.

``python health.py URL``: the answer is 200. ``python health.py URL WORD``: and it holds the word.
``python health.py --wait URL [WORD]``: the same question every second, until all is well.
"""

import sys
import time
import urllib.error
import urllib.request

TIMEOUT_S = 4


def problem(url: str, word: str) -> str | None:
    """What is wrong; None when all is well."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310  # the image's own command line
            body = answer.read(65536).decode(errors="replace")
    except urllib.error.HTTPError as err:
        return f"{url} answers {err.code}: {err.read(500).decode(errors='replace')}"
    except OSError as err:
        return f"{url}: {getattr(err, 'reason', err)}"
    return None if word in body else f"{url} does not say {word}: {body[:500]}"


def wait(url: str, word: str) -> None:
    """Return when all is well; say what is waited for, and every new problem once."""
    said = None
    while found := problem(url, word):
        if found != said:
            sys.stderr.write(f"waiting: {found}\n")
            said = found
        time.sleep(1)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--wait"]
    url, word = (*arguments, "")[:2]
    sys.exit(wait(url, word) if "--wait" in sys.argv else problem(url, word))
