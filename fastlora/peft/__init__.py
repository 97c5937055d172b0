"""The LoRA layers of a PEFT model run fastlora's ops, in place. The only importer of peft and transformers."""

from fastlora.peft.judge import path_of, why_not
from fastlora.peft.layers import FusedLinear
from fastlora.peft.patching import PatchReport, patch, register, unpatch

__all__ = ["FusedLinear", "PatchReport", "patch", "path_of", "register", "unpatch", "why_not"]
