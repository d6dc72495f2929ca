"""Prove a pruned network: its code against the plan, its outputs against a masked original."""

from intrafuse.verification.check import Check, check
from intrafuse.verification.outputs import tensors_of
from intrafuse.verification.verify import Verification, verify

__all__ = ["Check", "Verification", "check", "tensors_of", "verify"]
