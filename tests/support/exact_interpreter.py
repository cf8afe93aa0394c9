"""Makes Triton's interpreter compute as GPUs do.

Left alone, it multiplies bf16's bits as integers, rounds to bf16 towards zero, and adds up a tile's rows one after the
other, where compiled code halves them and errs far less.

It also makes the interpreter of triton 3.6 run with numpy 2.5, and that of triton 3.9 take a scalar as a mask.
Importing it has no effect outside the interpreter.
"""

import os

import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        patch_lang_tensor(tensor, scope)
        # A scalar is an array of one element, of which triton 3.6 asks what numpy 2.5 no longer gives: int(array).
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def _widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(torch.from_numpy(handle.data).view(torch.bfloat16).float().numpy(), tl.float32)

    def _create_dot(self, a, b, d, *options):
        return create_dot(self, _widened(a), _widened(b), d, *options)

    def _cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, src, dst_type)
        rounded = torch.tensor(src.data).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(rounded, tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = _create_dot, _cast_impl

    create_splat = InterpreterBuilder.create_splat

    def _create_splat(self, block, scalar):
        # Of a comparison, it makes numbers of what was compared; as a mask, triton 3.9 takes truth values alone.
        splat = create_splat(self, block, scalar)
        return TensorHandle(splat.data.astype(scalar.data.dtype), splat.dtype)

    InterpreterBuilder.create_splat = _create_splat

    add_up = ReduceOps.sum

    def _sum(self, input):
        data = input.handle.data
        if self.axis is None or self.keep_dims or data.dtype != "float32":
            return add_up(self, input)
        while (length := data.shape[self.axis]) > 1:
            lower, upper = data.take(range(length // 2), self.axis), data.take(range(length // 2, length), self.axis)
            data = lower + upper
        return self.to_tensor(data.squeeze(self.axis), input.dtype)

    ReduceOps.sum = _sum
