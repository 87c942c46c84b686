"""Which blocks of the transformer wait in host memory, and come to the GPU in each step."""

BUFFERS = 2
"""Device buffers of one block each: one is read while the next block is uploaded into the other."""


def streamed_positions(num_blocks: int, count: int) -> tuple[int, ...]:
    """Numbers of the blocks that are streamed, ascending.

    They are spread evenly, also from the last one of a step to the first one of the next: before
    each lies the work of as many resident blocks as there can be, behind which its upload hides.

    Args:
        num_blocks: of the transformer.
        count: of those that are streamed.

    Raises:
        ValueError: there are not so many.
    """
    if not 0 <= count <= num_blocks:
        raise ValueError(f"must be 0 to {num_blocks} blocks, got {count}")
    return tuple((2 * i + 1) * num_blocks // (2 * count) for i in range(count))
