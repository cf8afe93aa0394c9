"""A launchable specialisation of a kernel, for compiling it ahead of time."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """One kernel function with one choice of argument types and constants, as some launch would specialise it.

    Args:
        kernel: the file's name, such as "channel_stats".
        label: what sets it apart from the kernel's other variants, such as "partial bf16 aligned".
        fn: the `triton.jit` function.
        types: Triton type of each runtime argument, such as {"y_ptr": "*bf16", "N": "i32"}.
        constants: value of each constexpr argument; None for a pointer that is not given.
        divisible: the runtime arguments that are divisible by 16 (pointers: in bytes).
        num_warps: warps a program.
        num_stages: software pipeline depth.
        aligned: whether the budgets demand 128-bit accesses of it.
        main: whether `longact kernels` shows it where it shows one variant a function.
        memory_bound: whether they demand 50% occupancy, and issue time within half the memory time.
        tensor_core: whether they demand a tensor-core instruction.
        options: further options of `triton.compile`.
        targets: the targets it is launched on, such as ("sm_80", "sm_90"); all if empty.
    """

    kernel: str
    label: str
    fn: object
    types: dict[str, str]
    constants: dict[str, object]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    aligned: bool = False
    main: bool = False
    memory_bound: bool = True
    tensor_core: bool = False
    targets: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
