"""What Triton's interpreter lacks: numbers in bf16 and, for flash-linear-attention, a driver and loop counters."""

import ast
from importlib import import_module

import torch

interpreter, language = import_module("triton.runtime.interpreter"), import_module("triton.language")


def repair_bf16() -> None:
    """It keeps bf16 as bit patterns, rounds towards zero and computes with the patterns."""
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    create_dot = builder.create_dot

    def widen(x):
        if x.dtype.scalar != language.bfloat16:
            return x
        wide = torch.from_numpy(x.data.view("int16").copy()).view(torch.bfloat16).float()
        return interpreter.TensorHandle(wide.numpy(), language.float32)

    def dot_of_numbers(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    def nearest(x, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) != (language.float32, language.bfloat16):
            return convert(x, input_dtype, output_dtype, rounding_mode)
        bits = x.astype("float32").reshape(-1)
        return torch.from_numpy(bits).bfloat16().view(torch.int16).numpy().view("uint16").reshape(x.shape)

    def of_numbers(compute):
        def computed(self, a, b):
            wide = compute(self, widen(a), widen(b))
            return self.cast_impl(wide, language.bfloat16) if a.dtype.scalar == language.bfloat16 else wide

        return computed

    builder.create_dot = dot_of_numbers
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv"):
        setattr(builder, name, of_numbers(getattr(builder, name)))
    interpreter._convert_float = nearest


class Driver:
    """Of no GPU."""

    def get_current_target(self):
        return import_module("triton.backends.compiler").GPUTarget("cpu", 0, 1)


class CountersAreTensors(interpreter.ASTTransformer):
    """What a loop counts with is a number of Python there; compiled, it is a tensor and has a tensor's methods."""

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            name = node.target.id
            node.body = ast.parse(f"{name} = interpreter_semantic.to_tensor({name}, False)").body + node.body
        return node


def stand_in_for_a_gpu() -> None:
    """Kernels that ask for a driver get one, of their configurations the first, and loops that count in tensors."""
    import_module("triton.runtime").driver.set_active(Driver())
    import_module("triton.runtime.autotuner").Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]
    interpreter.FunctionRewriter.ast_transformer = CountersAreTensors()
