"""Associative recall drawn as the published generator draws it: one numpy generator, example after example.

The twin of `s5eqx.data.AssocRecall`, with the options that the library leaves out (several tokens a key, and
`.` for a key that did not occur).
"""

import itertools

import numpy as np


def vocabulary(vocab_size):
    return sorted([*map(str, range(vocab_size - 2)), ".", "=>"])


def draw(rng, vocab_size, length, num_keys=1, allow_dot=False):
    """One example as token ids, the answer last."""
    tokens = vocabulary(vocab_size)
    plain = [t for t in tokens if t not in (".", "=>")]
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
    sequence += ["=>", *query, seen.get(query, ".")]
    return [tokens.index(t) for t in sequence]


def data_set(rng, num_examples, vocab_size, length):
    """Distinct examples: `(inputs, targets)`."""
    more = lambda n: [draw(rng, vocab_size, length) for _ in range(n)]
    rows = sorted({tuple(row) for row in more(num_examples)})
    while len(rows) < num_examples:
        for row in map(tuple, more(num_examples - len(rows))):
            if row not in rows:
                rows.append(row)
    rng.shuffle(rows)
    rows = np.array(rows)
    return rows[:, :-1], rows[:, 1:]


def pipeline(seed, num_examples, num_test_examples, vocab_size, length):
    """Training and test sets. In the test all targets but the answer are -100."""
    rng = np.random.default_rng(seed)
    train = data_set(rng, num_examples, vocab_size, length)
    inputs, targets = data_set(rng, num_test_examples, vocab_size, length)
    return train, (inputs, np.where(np.arange(targets.shape[1]) < targets.shape[1] - 1, -100, targets))
