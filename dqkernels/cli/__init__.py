"""The command line: argument parsing only. `main` is the console script and `python -m dqkernels`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. What goes wrong is one line on stderr; `--debug`
adds the traceback. Torch is imported inside the verbs.
"""

from __future__ import annotations

import os
import signal
import sys

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; prints every failure as one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    from dqkernels.cli import app, common

    command = app.build()
    try:
        _terminate_cleanly()
        code = command.main(arguments, prog_name="dqkernels", standalone_mode=False)
        if code == INTERRUPTED:
            return _interrupted()
        sys.stdout.flush()
        return code if isinstance(code, int) else DONE
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # `dqkernels generate ... | head` is no error; the interpreter would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except common.CLICK_ERRORS as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            # The message is the whole help: a verb is missing.
            print(error.format_message(), file=sys.stderr)
            return WRONG_USAGE
        return _complain(error.format_message(), WRONG_USAGE)
    except common.Abort:
        return _interrupted()
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        wrong = isinstance(error, common.WrongUsage)
        text = str(error) if wrong or isinstance(error, common.Failed) else f"{type(error).__name__}: {error}"
        return _complain(common.spelled_as_flags(text, command), WRONG_USAGE if wrong else FAILED)


def _complain(message: str, code: int) -> int:
    """One line, whatever the message: `dqkernels: error: ...`."""
    print("dqkernels: error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _interrupted() -> int:
    # What a verb keeps of its work it says itself.
    print("\ndqkernels: interrupted", file=sys.stderr)
    return INTERRUPTED


def _terminate_cleanly() -> None:
    """SIGTERM unwinds like an exception, so that temporary files go away."""

    def stop(signum, frame):
        raise SystemExit(128 + signum)

    try:
        signal.signal(signal.SIGTERM, stop)
    except ValueError:
        pass  # not the main thread: the caller's signals are the caller's
