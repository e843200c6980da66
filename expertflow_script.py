"""The installed command `expertflow`, outside the package, whose import takes seconds of torch."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C ends it cleanly also before it has begun."""
    try:
        from expertflow.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("\nexpertflow: interrupted\n")
        return 130
    return run()
