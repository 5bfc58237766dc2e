"""torchrun, without its traceback when a worker fails: the worker has printed why, in one line, before it ended.

`python -m launchers.torchrun` takes the arguments of `torchrun` and is the same launcher. When it is stopped, it
gives the workers five minutes to save, if torch has an option for that, and not its usual 30 seconds. Under nohup,
it and its workers ignore SIGHUP. With --standalone, this machine's name need not resolve.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, main

from common import errors, launched


def launch() -> None:
    """Run torchrun with this process's arguments; if a rank fails, exit with the code of the first one that did."""
    for logger in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    launched.forget()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # torch installs a handler, whatever nohup has set (pytorch/pytorch#67538), and then the workers would not
        # inherit that. A signal that is blocked reaches neither.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    options = ["--shutdown-timeout=300"] if "--shutdown-timeout" in get_args_parser().format_help() else []
    if "--standalone" in sys.argv:
        options += ["--nnodes=1", "--local-addr=127.0.0.1"]
    try:
        main([*options, *sys.argv[1:]])
    except ChildFailedError as error:
        exit_code = error.get_first_failure()[1].exitcode
        sys.exit(exit_code if exit_code > 0 else 128 - exit_code)  # as a shell reports that a signal ended it
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval.value)


if __name__ == "__main__":
    errors.run(launch)
