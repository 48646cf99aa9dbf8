"""The exception tree. One error says what happened, what was not done and what to do.

ConsiliumError                      exit code
├── UsageError                      2   wrong usage or settings
│   ├── SettingsError               2   a study, policy or site file is wrong (lists every problem)
│   └── DataError                   2   scans that cannot be used
├── Refusal                         1   refused by policy, audit or verification
│   ├── PolicyRefusal               1   the site's policy does not allow the order
│   ├── BudgetExhausted             1   the ledger would exceed its cap
│   └── VerificationFailed          1   a bundle, chain or signature does not hold
├── Unreachable                     3   a site or service does not answer
├── ProtocolError                   4   a message of the other side cannot be read
└── IntegrityError                  4   our own stored state is damaged
    └── LedgerError                 4   the ledger is damaged, in use, of another site, or an older copy

Texts carry numbers and names of settings, never patient data. What a site sends out
is never the text of an exception, only a code of `common.protocol.messages.RefusalCode`.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    INTERNAL = 4


class ConsiliumError(Exception):
    """Root of every error that Consilium raises on purpose."""

    exit_code: ExitCode = ExitCode.INTERNAL


class UsageError(ConsiliumError):
    """The command or its arguments are wrong; nothing was done."""

    exit_code = ExitCode.USAGE


class SettingsError(UsageError):
    """A settings file is wrong. The text lists every problem, one a line."""


class DataError(UsageError):
    """Scans cannot be used for this study."""


class Refusal(ConsiliumError):
    """Refused by policy, audit or verification."""

    exit_code = ExitCode.REFUSED


class PolicyRefusal(Refusal):
    """The site's policy does not allow what was asked."""


class BudgetExhausted(Refusal):
    """The ledger would exceed its cap; nothing was trained or answered."""


class VerificationFailed(Refusal):
    """A bundle, record chain or signature does not hold."""


class Unreachable(ConsiliumError):
    """A site or service did not answer in time."""

    exit_code = ExitCode.UNREACHABLE


class ProtocolError(ConsiliumError):
    """A message is malformed, of another protocol version, or not what its own digest says."""

    exit_code = ExitCode.INTERNAL


class IntegrityError(ConsiliumError):
    """Stored state of our own is damaged or contradicts itself."""

    exit_code = ExitCode.INTERNAL


class LedgerError(IntegrityError):
    """The ledger of a site cannot be used as it is, or is not the one that it was; nothing was spent."""
