"""Which of a model's blocks are in host memory."""


def streamed_positions(num_blocks: int, count: int) -> tuple[int, ...]:
    """So many blocks, spread evenly, so that others run while each is on its way.

    Args:
        num_blocks: of the model.
        count: from 0 to all of them.
    """
    return tuple((2 * number + 1) * num_blocks // (2 * count) for number in range(count))
