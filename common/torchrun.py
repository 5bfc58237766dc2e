"""torchrun, without its traceback when a worker fails: the worker has said why, in one line, before it ended.

`python -m common.torchrun` takes the arguments of `torchrun` and is the same launcher.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    for logger in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        exit_code = error.get_first_failure()[1].exitcode
        sys.exit(exit_code if exit_code > 0 else 128 - exit_code)  # as a shell says that a signal ended it
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval.value)
