"""Check a pruned network: its code by the plan, its outputs by a masked original."""

from intrafuse.pruning.verification.proof import Check, check
from intrafuse.pruning.verification.verify import Verification, verify

__all__ = ["Check", "Verification", "check", "verify"]
