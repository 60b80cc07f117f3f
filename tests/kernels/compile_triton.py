"""Compile every Triton kernel for a GPU that need not be here: `python -m compile_triton [COMPUTE CAPABILITY]`.

Each op is called as in the tests; instead of a launch, the kernel is compiled to machine code for the GPU.
"""

import sys
from importlib import import_module
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import spikingbrain_kernels as kernels
