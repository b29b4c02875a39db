"""Exchanges between ranks: the Communicator protocol and its transports.

``MpiCommunicator`` is in ``ffmoe_core.comm.mpi`` (needs mpi4py) and ``NcclCommunicator`` in
``ffmoe_core.comm.nccl`` (needs CuPy): neither package is imported before it is asked for.
"""

from .communicator import Communicator, Step, Transfer, all_reduced
from .control import Control
from .local import LocalCommunicator

__all__ = ["Communicator", "Control", "LocalCommunicator", "Step", "Transfer", "all_reduced"]
