"""A trial of chat templates, which are strangers' programs: it shows whether one ends, before rows go through it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flashbone.errors import ConfigError, FormatError, one_line

LONGEST, SECONDS, MEMORY = 1 << 18, 2.0, 300 << 20  # characters of a template, and limits of its trial
RENDERING = 10.0  # seconds of the processor for one conversation
_TRIAL = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class _TooMuch(Exception):
    pass


class TooSlow(FormatError):
    """A chat template needs too long for a conversation."""


@contextmanager
def in_time() -> Iterator[None]:
    """A limit of the processor's time, in the main thread: others get no signals.

    Raises:
        TooSlow: it is used up.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TooSlow(f"the chat template takes more than {RENDERING:g} seconds for one conversation; use another")

    handler, timer = signal.signal(signal.SIGVTALRM, stop), signal.setitimer(signal.ITIMER_VIRTUAL, RENDERING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, handler)


def give_template(tokenizer: Any, file: Path) -> None:
    """Give a tokenizer the chat template in a file.

    Raises:
        ConfigError: the file is no text, or `check_template` refuses it.
    """
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8 text; save it as UTF-8") from None
    check_template(tokenizer, str(file))


def check_template(tokenizer: Any, where: str) -> None:
    """Refuse a chat template that is malformed, forbidden, or that two short turns keep busy for two seconds.

    Args:
        tokenizer: What has it.
        where: Where it is from, for errors.

    Raises:
        ConfigError: it is.
    """
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    if not template:
        return
    if any(not isinstance(text, str) or len(text) > LONGEST for text in texts):
        raise ConfigError(f"{where}: a chat template has to be text of at most {LONGEST:,} characters")
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    try:
        with _limited():
            tokenizer.apply_chat_template(_TRIAL, tokenize=False)
    except (_TooMuch, MemoryError, OverflowError, RecursionError):
        raise ConfigError(
            f"{where}: the chat template takes more than {SECONDS:g} seconds or {MEMORY >> 20} MiB for two short"
            " turns; give another with training.chat_template_path"
        ) from None
    except (SecurityError, TemplateSyntaxError) as error:
        raise ConfigError(f"{where}: the chat template cannot be used: {one_line(error, 200)}") from error
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return  # it may want other turns than these


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **values: Any) -> str:
    """A conversation in the tokenizer's chat template.

    Raises:
        FormatError: the template refuses it, or needs too long for it.
    """
    from jinja2 import TemplateError

    try:
        with in_time():
            return tokenizer.apply_chat_template(messages, tokenize=False, **values)
    except TooSlow:
        raise
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as e:
        kind = "" if type(e) is TemplateError else f"{type(e).__name__}: "
        reason = one_line(e, 200) or type(e).__name__
        raise FormatError(f"the chat template refuses the conversation: {kind}{reason}") from e


@contextmanager
def _limited() -> Iterator[None]:
    """Limits the time, in the main thread, and the memory, where the system reports it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    import resource

    def stop(*_: Any) -> None:
        raise _TooMuch

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
