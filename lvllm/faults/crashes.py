"""Crashes that end a process at once, and show what each thread of Python did.

xgrammar's library tvm_ffi handles SIGSEGV: it reads the symbols of all libraries, which takes 2 to
3 s, and prints how the fault was reached in C. A handler must take no lock, and this one takes that
of the dynamic linker: a crash while a library is loaded left the process waiting for ever, and with
it the server. Python's faulthandler prints its lines within a millisecond, without any lock.
"""

import faulthandler
import importlib
import signal
import sys
import threading
from contextlib import suppress

from lvllm.faults.orphans import is_in_vllms
from lvllm.faults.process import is_command

__all__ = ["end_at_once_on_a_crash"]


def end_at_once_on_a_crash() -> None:
    """Let a crash end this process, if it is one of vLLM's, and not a user's own.

    Only the main thread may change handlers; in any other one, nothing happens.
    """
    own = is_in_vllms() or is_command()
    if not own or threading.current_thread() is not threading.main_thread():
        return
    with suppress(ImportError):
        importlib.import_module("tvm_ffi")  # vLLM imports it later, and it sets its handler then
    # faulthandler calls the handler that was there before it.
    faulthandler.disable()
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    with suppress(AttributeError, OSError, ValueError):  # standard error can be closed
        faulthandler.enable(sys.__stderr__.fileno())  # type: ignore[union-attr]
