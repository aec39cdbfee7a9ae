"""Associative recall and induction heads drawn as the published generators draw them: one numpy generator, example
after example.

The twin of `s5eqx.data.synthetics.AssocRecall` and `InductionHeads`. Its options have the published names.
"""

import itertools

import numpy as np


def vocabulary(vocab_size):
    return sorted([*map(str, range(vocab_size - 2)), ".", "=>"])


def draw(rng, vocab_size, input_seq_len, copy_method, **options):
    """One example as token ids, the answer last."""
    tokens = vocabulary(vocab_size)
    example = {"assoc_recall": recall, "induction_head": induction}[copy_method]
    return [tokens.index(t) for t in example(rng, tokens[1:-1], input_seq_len, **options)]


def recall(rng, plain, length, num_keys=1, allow_dot=False):
    half = len(plain) // 2
    choose = lambda items: items[rng.integers(0, len(items))]

    key_tuples = list(itertools.product(plain[:half], repeat=num_keys))
    value_of = {key: choose(plain[half:]) for key in key_tuples}
    sequence, seen = [], {}
    for _ in range(length // (num_keys + 1)):
        key = choose(key_tuples)
        seen[key] = value_of[key]
        sequence += [*key, value_of[key]]
    query = choose(key_tuples)
    while query not in seen and not allow_dot:
        query = choose(list(seen))
    return [*sequence, "=>", *query, seen.get(query, ".")]


def induction(rng, plain, length, induction_len=1, induction_num_triggers=1):
    # Given probabilities, numpy draws otherwise than without.
    sequence = [*rng.choice(plain, length, p=np.full(len(plain), 1 / len(plain))), "=>"]
    triggers = 1 if rng.random() < 0.5 else induction_num_triggers
    places = np.sort(rng.integers(length - 1 - induction_len, size=triggers))
    kept = [places[0]]
    for place in places[1:]:
        if place > kept[-1] + induction_len:
            kept.append(place)
    copy = sequence[kept[0] + 1 : kept[0] + 1 + induction_len]
    for place in kept:
        sequence[place : place + 1 + induction_len] = ["=>", *copy]
    return sequence + copy


def data_set(rng, num_examples, **options):
    """Distinct examples: `(inputs, targets)`."""
    more = lambda n: [tuple(draw(rng, **options)) for _ in range(n)]
    rows = sorted(set(more(num_examples)))
    while len(rows) < num_examples:
        for row in more(num_examples - len(rows)):
            if row not in rows:
                rows.append(row)
    rng.shuffle(rows)
    rows = np.array(rows)
    return rows[:, :-1], rows[:, 1:]


def pipeline(seed, num_examples, num_test_examples, **options):
    """Training and test inputs and targets. In the test all targets but the answer are -100."""
    rng = np.random.default_rng(seed)
    train = data_set(rng, num_examples, **options)
    inputs, targets = data_set(rng, num_test_examples, **options)
    asked = np.arange(targets.shape[1]) >= targets.shape[1] - options.get("induction_len", 1)
    return *train, inputs, np.where(asked, targets, -100)
