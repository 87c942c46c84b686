from hypothesis import given
from hypothesis import strategies as st

from krea2_srt.engine.budget import RECOVERY_TURNS, TokenBudget


def succeed(budget: TokenBudget, turns: int) -> None:
    for _ in range(turns):
        budget.succeeded()


def test_a_budget_starts_at_its_most_and_stays_there():
    budget = TokenBudget(1000)
    succeed(budget, 3 * RECOVERY_TURNS)
    assert budget.tokens == 1000


def test_it_shrinks_to_half_of_the_pack_that_did_not_fit():
    budget = TokenBudget(1000)
    budget.out_of_memory(600)
    assert budget.tokens == 300


def test_it_grows_again_after_many_good_turns_and_not_before():
    budget = TokenBudget(1000)
    budget.out_of_memory(800)
    succeed(budget, RECOVERY_TURNS - 1)
    assert budget.tokens == 400
    succeed(budget, 1)
    assert budget.tokens == 500
    succeed(budget, 10 * RECOVERY_TURNS)
    assert budget.tokens == 1000


def test_another_failure_starts_the_count_of_good_turns_anew():
    budget = TokenBudget(1000)
    budget.out_of_memory(800)
    succeed(budget, RECOVERY_TURNS - 1)
    budget.out_of_memory(400)
    succeed(budget, RECOVERY_TURNS - 1)
    assert budget.tokens == 200


@given(st.integers(1, 10**6), st.lists(st.integers(1, 10**6), max_size=40))
def test_it_stays_between_one_and_its_most_and_always_recovers(most, failures):
    budget = TokenBudget(most)
    for tokens in failures:
        budget.out_of_memory(tokens)
        assert 1 <= budget.tokens <= most
        assert budget.tokens <= max(1, tokens // 2)
    turns = 0
    while budget.tokens < most:
        budget.succeeded()
        turns += 1
        assert turns <= 70 * RECOVERY_TURNS
    assert budget.tokens == most


def test_a_sequence_larger_than_the_budget_says_nothing_about_smaller_packs():
    """Such a sequence runs alone whatever the budget; its failures must not end all packing."""
    budget = TokenBudget(34000)
    for _ in range(20):
        budget.out_of_memory(16448)
    assert budget.tokens == 16448 // 2
