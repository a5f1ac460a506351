"""``python -m d2net``, and where the command ``d2net`` begins: Ctrl-C during its first imports, too, ends in a line."""

import os
import signal
import sys


def main() -> None:
    """The command line, from its first import on."""
    try:
        from d2net.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except SystemExit as end:
        if end.code != 130:
            raise
    else:
        return
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends it would print tracebacks
    # Python itself would end by the signal, not with 130, where Ctrl-C came within an exec(), as of a dataclass.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
