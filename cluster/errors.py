"""The errors of the cluster: its branch of the tree in runtime/errors.py.

LocalReasonError
└── ClusterError            the home cluster could not do what was asked
    ├── PairingFailed       two machines did not come to trust each other
    ├── ProtocolError       the other side sent what the protocol does not allow
    ├── PlanImpossible      no split of the model fits the machines
    ├── NodeLost            a machine of the ring does not answer any more
    │   ├── NextLost        and the machine before it is who found out
    │   └── HeadLost        and it is the one that the others work for
    └── NodeBusy            a machine serves another ring
"""

from ..runtime.errors import LocalReasonError


class ClusterError(LocalReasonError):
    """The home cluster could not do what was asked."""


class PairingFailed(ClusterError):
    """Two machines did not come to trust each other."""


class ProtocolError(ClusterError):
    """The other side sent what the protocol does not allow."""


class PlanImpossible(ClusterError):
    """No split of the model fits the machines."""


class NodeLost(ClusterError):
    """A machine of the ring does not answer any more."""


class NextLost(NodeLost):
    """The next machine of the ring takes nothing from this one any more."""


class HeadLost(NodeLost):
    """The head of the ring says nothing any more."""


class NodeBusy(ClusterError):
    """A machine serves another ring."""
