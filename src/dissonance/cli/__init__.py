"""The command line: options in, one call of the Python API, a summary out.

Exit codes: 0 done; 2 the input is wrong, said in one line; 3 labels are due; 130 interrupted; 1 anything else.
"""

import os
import re
import sys
from typing import Annotated

import pyarrow as pa
import typer
from typer.exceptions import TyperException

from dissonance import __version__
from dissonance.cli import bench, conflicts, exchange, label, status
from dissonance.cli import run as run_commands
from dissonance.errors import DissonanceError, LabelsDue

app = typer.Typer(
    name="dissonance",
    help="Find the answers on which your reward model and your policy disagree.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for module in (conflicts, label, exchange, run_commands, bench, status):
    app.add_typer(module.app)


@app.callback(invoke_without_command=True)
def main_callback(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Find the answers on which your reward model and your policy disagree."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when a process forks
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries are not about what was asked
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what was freed, twice as much at the peak
    try:
        result = typer.main.get_command(app).main(
            arguments or ["--help"], prog_name="dissonance", standalone_mode=False
        )
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return _fail(_with_value(message, arguments), 2)
    except DissonanceError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        return 1
    except OSError as error:
        return _fail(str(error), 1)
    if result == 130:  # Typer's word for a KeyboardInterrupt
        return _fail("interrupted; the same command goes on where it was", 130)
    return result if isinstance(result, int) else 0


def _with_value(message: str, arguments: list[str]) -> str:
    """Typer names the option that has a wrong value, but not the value."""
    named = re.search(r"Invalid value for '(--[\w-]+)", message)
    if named is None or named[1] not in arguments[:-1]:
        return message
    return f"{message.rstrip('.')}: got {arguments[arguments.index(named[1]) + 1]!r}"


def _fail(message: str, code: int) -> int:
    kind = "" if code == LabelsDue.exit_code else "error: "
    print(f"dissonance: {kind}{' '.join(message.split())}", file=sys.stderr)
    return code
