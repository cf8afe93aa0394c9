"""Counts the bytes that interpreted kernels read and write, access by access."""

from contextlib import contextmanager


@contextmanager
def count_bytes():
    from triton.runtime.interpreter import interpreter_builder as builder

    moved = {"read": 0, "written": 0}
    load, store = builder.create_masked_load, builder.create_masked_store

    def bytes_of(ptrs, mask):
        return int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8

    def counting_load(ptrs, mask, *rest):
        moved["read"] += bytes_of(ptrs, mask)
        return load(ptrs, mask, *rest)

    def counting_store(ptrs, value, mask, *rest):
        moved["written"] += bytes_of(ptrs, mask)
        return store(ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        yield moved
    finally:
        del builder.create_masked_load, builder.create_masked_store
