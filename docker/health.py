"""Ask a server in this container how it is, without curl: exit code 0 when it is well, 1 with one line when not.

``python health.py URL``: the answer is 200. ``python health.py URL WORD``: and it holds the word.
``python health.py --wait URL [WORD]``: the same question every second, until all is well.

Where the gateway's settings say that it speaks TLS, an ``http:`` URL is asked over TLS. The certificate is not checked:
it is for the name that people use, and this is the same container. Where it wants certificates of its clients it is
shown its own; a gateway that refuses that one is there, which is all that can be asked then.
"""

import os
import ssl
import sys
import time
import urllib.error
import urllib.request

TIMEOUT_S = 4
CERTIFICATE, KEY, CLIENTS = (os.environ.get(f"DIGITS_TLS_{name}_FILE") for name in ("CERT", "KEY", "CLIENT_CA"))


def problem(url: str, word: str) -> str | None:
    """What is wrong; None when all is well."""
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    if CLIENTS and CERTIFICATE:
        unchecked.load_cert_chain(CERTIFICATE, KEY)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=unchecked) as answer:  # noqa: S310  # our own URL
            body = answer.read(65536).decode(errors="replace")
    except urllib.error.HTTPError as err:
        return f"{url} answers {err.code}: {err.read(500).decode(errors='replace').strip()}"
    except (ssl.SSLError, ConnectionResetError) as err:  # after the handshake
        return None if CLIENTS else f"{url}: {err}"
    except urllib.error.URLError as err:
        return f"{url}: {err.reason}"
    except OSError as err:
        return f"{url}: {err}"
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
    if CERTIFICATE:
        url = url.replace("http:", "https:", 1)
    sys.exit(wait(url, word) if "--wait" in sys.argv else problem(url, word))
