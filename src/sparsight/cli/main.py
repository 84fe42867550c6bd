"""Find the verb, run it, and turn any error into one message and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence

import sparsight
from sparsight.cli.verbs import HELP, guess, listed, run
from sparsight.errors import SparsightError, UserError, is_out_of_memory, out_of_memory
from sparsight.interruption import STOPS, Terminated, raise_terminated
from sparsight.plugins import VERB_PLUGINS, all_plugins, name_clash, plugin_named

VERBS = {
    "demo": "run the whole chain on rendered images: minutes, offline, no GPU",
    "extract": "run a vision model over images and keep its activations in a store",
    "train": "train sparse autoencoders on a store, or on a model and images directly",
    "sweep": "train several at once, in one pass: vary k, width, seed, learning rate, site",
    "evaluate": "measure error, sparsity, zero-shot and ground truth, next to baselines",
    "encode": "write the active latents of every vector to disk",
    "index": "find the images and patches to which each latent responds",
    "latents": "list, filter and describe latents; find images by a query of their latents",
    "image": "list the latents that fire in one image, and at each of its patches",
    "name": "name latents by labels or text, where a name beats those of an untrained SAE",
    "attack": "typographic attacks: measure how words mislead a model, find what reads words",
    "export": "write a CLIP for transformers, open_clip or OpenAI's code, and check the copy",
    "visualize": "make images that activate latents, beside the best real ones",
    "steer": "turn latents up and down; measure zero-shot and retrieval at each strength",
    "search": "find images by text or image, with plain, reconstructed or edited embeddings",
    "convert": "write an SAE in another project's format, or another project's SAE in ours",
    "taxonomy": "find what kind of thing each latent stands for, layer by layer",
    "report": "write one HTML page about one or more runs",
    "finetune": "train a CLIP against typographic attacks; measure it before and after",
    "push": "upload a run to the Hugging Face Hub, with a model card",
    "pretrained": "list published autoencoders and their names on the Hub",
}
"""Every verb, in the order of a workflow; the module of the same name in this folder runs it."""

FAULT = 1
USAGE_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sparsight ARGUMENTS`.

    Args:
        arguments: the command line without the program's name; by default that of the process.

    Returns:
        Exit code: 0; 1 for a fault; 2 for a user's mistake; 130 after Ctrl-C; 143 after SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # print names that are not UTF-8 escaped
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
    if arguments is None:
        warnings.formatwarning = _warning_line
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
        stop_behind = _stop_behind(error)
        if stop_behind is not None:
            return _stopped(stop_behind, arguments is None)
        if debug and not isinstance(error, BrokenPipeError):
            raise
        return _reported(error)
    return 0


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    line: str | None = None,
) -> str:  # fmt: skip
    """Return a warning as one line; only other packages' warnings name their place in the code."""
    if filename == sys.argv[0] or filename.startswith((sparsight.__path__[0], "<")):
        return f"sparsight: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _run(verb: str, arguments: Sequence[str]) -> None:
    """Run one of Sparsight's own verbs, or one that another package registers.

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
            f"Unknown verb {verb!r}.{guess(verb, known)} `sparsight --help` lists all verbs."
        )
    plugin.call(arguments)


def _reported(error: Exception) -> int:
    """Print an error as one line if possible, and return the exit code; otherwise raise it."""
    if isinstance(error, SparsightError):
        return _complain(str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):  # `sparsight … | head`: the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError):  # about a file or folder, without a message of our own
        return _complain(_of_system(error), FAULT)
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        return _complain(str(out_of_memory(error, "Use smaller batches.")), FAULT)
    raise error


def _stopped(stop: BaseException, ends: bool) -> int:
    """Report a stop; if the process now ends (`ends`), a further signal shows no traceback."""
    for number in (signal.SIGINT, signal.SIGTERM) if ends else ():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if isinstance(stop, Terminated):
        return _complain(_interrupted(stop, "Terminated."), TERMINATED)
    return _complain(_interrupted(stop, "Interrupted."), INTERRUPTED)


def _stop_behind(error: BaseException | None) -> BaseException | None:
    """Return the stop behind another error: some libraries replace it while they are imported."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, STOPS):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _let_exit() -> None:
    """Ignore signals: once everything is done, a late signal must not make it a failure."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _help() -> str:
    return (
        "usage: sparsight VERB [OPTIONS]\n\n"
        "Open up CLIP and other vision transformers with sparse autoencoders.\n\n"
        f"verbs:\n{listed(VERBS)}\n\n{_outside()}"
        "`sparsight VERB --help` shows examples and the most important options, `--help-all`\n"
        "shows every option. Each verb also reads its options from `--config FILE.toml`.\n"
        "`--traceback` shows where an error came from."
    )


def _outside() -> str:
    """List the verbs of other packages, without importing them."""
    lines = []
    for plugin in all_plugins(VERB_PLUGINS):
        about = name_clash(plugin, VERBS) or plugin.summary
        lines.append(f"  {plugin.name}  {plugin.package}: {about}")
    return "\n".join(["verbs of other packages:", *lines, "", ""]) if lines else ""


def _interrupted(stop: BaseException, what: str) -> str:
    """Say what stopped the run, and what the code that was running says about the work it kept."""
    return " ".join([what, *getattr(stop, "__notes__", ["Run the same command again."])])


def _of_system(error: OSError) -> str:
    """Return the system's message, with the name of the file."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}." if error.filename is not None else f"{reason}."


def _complain(message: str, code: int = USAGE_ERROR) -> int:
    print(f"sparsight: {message}", file=sys.stderr)
    return code
