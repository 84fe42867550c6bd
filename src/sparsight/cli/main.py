"""Find the verb, run it, and turn whatever happens into one message and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Sequence

import sparsight
from sparsight.cli.verbs import HELP, guess, listed, run
from sparsight.errors import SparsightError, UserError, is_out_of_memory, out_of_memory
from sparsight.interruption import STOPS, Terminated, raise_terminated
from sparsight.plugins import VERB_PLUGINS, all_plugins, name_clash, plugin_named

VERBS = {
    "demo": "everything below at once, on rendered pictures: minutes, offline, no GPU",
    "extract": "run a vision model over images and keep its activations in a store",
    "train": "train sparse autoencoders on a store, or on a model and images directly",
    "sweep": "train several at once: other k, width, seed, learning rate, site, one pass",
    "evaluate": "measure an SAE beside its baselines: error, sparsity, zero-shot, truth",
    "encode": "keep the active latents of every vector on disk",
    "index": "find the images and patches that every latent responds to",
    "attack": "write words on pictures: what they cost, what in the model reads them",
    "export": "write a CLIP for transformers, open_clip or OpenAI's code, and compare the two",
    "steer": "turn latents up and down: zero-shot and retrieval over a range of strengths",
    "search": "find images by text or picture, with embeddings plain, reconstructed or edited",
    "convert": "write an SAE in another project's format, or another project's in ours",
    "report": "write one HTML page about some runs",
    "finetune": "train a CLIP against words in pictures; measure it before and after",
    "push": "upload a run to the Hugging Face Hub, with a model card",
    "pretrained": "list autoencoders that others have published, and their names on the Hub",
}
"""Every verb, in the order of the work; the module of the same name in this folder runs it."""

FAULT = 1
USAGE_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sparsight ARGUMENTS`.

    Args:
        arguments: without the program's name; default those of the process.

    Returns:
        Exit code: 0; 1 for a fault; 2 for a mistake of the user's; 130 after Ctrl-C; 143 after
        SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that are not UTF-8 are printed escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--traceback" in given or bool(os.environ.get("SPARSIGHT_DEBUG"))
    given = [argument for argument in given if argument != "--traceback"]
    if len(given) > 1 and given[0] == "help":  # `help train` is `train --help`
        given = [*given[1:], "--help"]
    if not given or given[0] in HELP:
        print(_help())
        return 0 if given else USAGE_ERROR
    if given[0] in ("-V", "--version"):
        print(f"sparsight {sparsight.__version__}")
        return 0
    verb, *rest = given
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, raise_terminated)
    try:
        _run(verb, rest)
        if arguments is None:
            _let_exit()
    except SystemExit as stop:
        if isinstance(stop, Terminated):
            return _stopped(stop, arguments is None)
        return stop.code if isinstance(stop.code, int) else USAGE_ERROR  # --help, or a wrong flag
    except KeyboardInterrupt as stop:
        return _stopped(stop, arguments is None)
    except Exception as error:
        behind = _stop_behind(error)
        if behind is not None:
            return _stopped(behind, arguments is None)
        if debug and not isinstance(error, BrokenPipeError):
            raise
        return _told(error)
    return 0


def _run(verb: str, arguments: Sequence[str]) -> None:
    """Run a verb of Sparsight's own, or one that another package registers.

    Raises:
        UserError: no verb has this name.
    """
    if verb in VERBS:
        run(verb, arguments)
        return
    plugin = plugin_named(VERB_PLUGINS, verb)
    if plugin is None:
        known = [*VERBS, *(other.name for other in all_plugins(VERB_PLUGINS))]
        raise UserError(
            f"There is no verb {verb!r}.{guess(verb, known)} `sparsight --help` lists them."
        )
    plugin.call(arguments)


def _told(error: Exception) -> int:
    """Put an error into one line where that can be done; else raise it again."""
    if isinstance(error, SparsightError):
        return _complain(str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):  # `sparsight … | head`: whoever read has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError):  # a file or folder that no one has put into words
        return _complain(_of_system(error), FAULT)
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        return _complain(str(out_of_memory(error, "Give the run less to hold at a time.")), FAULT)
    raise error


def _stopped(stop: BaseException, ends: bool) -> int:
    """Tell of a stop; a further signal ends a process that ends now, and shows no traceback."""
    for number in (signal.SIGINT, signal.SIGTERM) if ends else ():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if isinstance(stop, Terminated):
        return _complain(_interrupted(stop, "Terminated."), TERMINATED)
    return _complain(_interrupted(stop, "Interrupted."), INTERRUPTED)


def _stop_behind(error: BaseException | None) -> BaseException | None:
    """The stop that a library has made another error of, as some do while they are imported."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, STOPS):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _let_exit() -> None:
    """Everything is done: a signal that comes while the process ends does not make it a failure."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _help() -> str:
    return (
        "usage: sparsight VERB [OPTIONS]\n\n"
        "Open up CLIP and other vision transformers with sparse autoencoders.\n\n"
        f"verbs:\n{listed(VERBS)}\n\n{_outside()}"
        "`sparsight VERB --help` shows examples and the options that matter most, `--help-all`\n"
        "every option. Each verb reads its options from `--config FILE.toml`, too. `--traceback`\n"
        "shows where an error came from."
    )


def _outside() -> str:
    """The verbs of other packages, none of which is imported for this."""
    lines = []
    for plugin in all_plugins(VERB_PLUGINS):
        about = name_clash(plugin, VERBS) or plugin.summary
        lines.append(f"  {plugin.name}  {plugin.package}: {about}")
    return "\n".join(["verbs of other packages:", *lines, "", ""]) if lines else ""


def _interrupted(stop: BaseException, what: str) -> str:
    """What stopped the run, and what the code that was running says of what it kept."""
    return " ".join([what, *getattr(stop, "__notes__", ["Run the same command again."])])


def _of_system(error: OSError) -> str:
    """What the system says, about which file."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}." if error.filename is not None else f"{reason}."


def _complain(message: str, code: int = USAGE_ERROR) -> int:
    print(f"sparsight: {message}", file=sys.stderr)
    return code
