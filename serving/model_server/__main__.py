"""``python -m serving.model_server --port=8500 --rest_api_port=8501 --model_name=digits --model_base_path=FOLDER``.

Exit status: 0 after SIGTERM or SIGINT, 2 for a command line or address that cannot be used, in one line on stderr.
"""

import os
import sys

# Before anything imports TensorFlow or gRPC: both write plain text otherwise. oneDNN stays on: it is twice as fast.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from serving.model_server import flags, logs
from serving.model_server.errors import UsageError


def main() -> int:
    """Read the flags, serve until told to stop; the exit status."""
    try:
        settings = flags.parse(sys.argv[1:])
        from serving.model_server.server import Server, leave

        logs.configure()
        server = Server(settings)
    except UsageError as err:
        print(f"serving.model_server: {err}", file=sys.stderr)
        return 2
    leave(server.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
