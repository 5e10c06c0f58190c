"""Wrong solutions of notebook 1's exercises: (code, a part of the message that it gets), by exercise."""

WRONG: dict[str, list[tuple[str, str]]] = {}


WRONG["1.1"] = [
    (
        """
def merge_once(ids, pair, new_id):
    merged = []
    for i in range(len(ids)):
        merged.append(new_id if tuple(ids[i : i + 2]) == pair else ids[i])
    return merged
""",
        "after a merge move on by two",
    ),
    (
        """
def merge_once(ids, pair, new_id):
    merged, i = [], 0
    while i < len(ids) - 1:
        if (ids[i], ids[i + 1]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged
""",
        "what becomes of the last id?",
    ),
    (
        """
def merge_once(ids, pair, new_id):
    for i in range(len(ids) - 1, 0, -1):
        if (ids[i - 1], ids[i]) == pair:
            ids[i - 1 : i + 1] = [new_id]
    return ids
""",
        "your function changed the list it was given",
    ),
    (
        """
def merge_once(ids, pair, new_id):
    ids = list(ids)
    for i in range(len(ids) - 1, 0, -1):
        if tuple(ids[i - 1 : i + 1]) == pair:
            ids[i - 1 : i + 1] = [new_id]
    return ids
""",
        "go from left to right",
    ),
    (
        """
def merge_once(ids, pair, new_id):
    starts = [i for i in range(len(ids)) if tuple(ids[i : i + 2]) == pair]
    kept = [i for i in range(len(ids)) if i - 1 not in starts or i in starts]
    return [new_id if i in starts else ids[i] for i in kept]
""",
        "the middle 1 was used twice",
    ),
    (
        """
def merge_once(ids, pair, new_id):
    merged, i = [], 0
    while i < len(ids):
        if set(ids[i : i + 2]) == set(pair):
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged
""",
        "the order of the two matters",
    ),
    (
        """
def merge_once(ids, pair, new_id):
    merged, i = [], 0
    while i < len(ids):
        if ids[i : i + 2] == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged
""",
        "a slice of a list is a list",
    ),
    (
        """
def merge_once(ids, pair, new_id):
    merged, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and ids[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged
""",
        "the last id has no right neighbour",
    ),
    (
        """
def merge_once(ids, pair, new_id):
    ids = list(ids)
    for i in range(len(ids) - 1):
        if (ids[i], ids[i + 1]) == pair:
            ids[i : i + 2] = [new_id]
    return ids
""",
        "a list that is shortened in its own loop ends early",
    ),
    (
        """
def merge_once(ids, pair, new_id):
    text = " ".join(str(i) for i in ids)
    return [int(i) for i in text.replace(f"{pair[0]} {pair[1]}", str(new_id)).split()]
""",
        "not the digits of a string",
    ),
]
WRONG["1.2"] = [
    (
        """
def text_of(ids, tokens):
    return "".join(tokens[i].decode("utf-8", errors="replace") for i in ids)
""",
        "join all bytes, then decode once",
    ),
    (
        """
def text_of(ids, tokens):
    return b"".join(tokens[i] for i in ids).decode("utf-8")
""",
        "half of a character raised UnicodeDecodeError",
    ),
    (
        """
def text_of(ids, tokens):
    return b"".join(tokens[i] for i in ids).decode("utf-8", errors="ignore")
""",
        "vanished without a trace",
    ),
    (
        """
def text_of(ids, tokens):
    return " ".join(tokens[i].decode() for i in ids)
""",
        "there are spaces between the tokens",
    ),
    (
        """
def text_of(ids, tokens):
    return "".join(chr(byte) for i in ids for byte in tokens[i])
""",
        "are you decoding as UTF-8?",
    ),
    (
        """
def text_of(ids, tokens):
    return "".join(tokens[i].decode("utf-8") for i in ids)
""",
        "join all bytes, then decode once",
    ),
]
WRONG["1.3"] = [
    (
        """
def cut_windows(ids, T, stride):
    return [(ids[i : i + T], ids[i : i + T]) for i in range(0, len(ids) - T, stride)]
""",
        "the target equals the input",
    ),
    (
        """
def cut_windows(ids, T, stride):
    return [(ids[i : i + T], ids[i + T : i + 2 * T]) for i in range(0, len(ids) - T, stride)]
""",
        "shift it by one token, not by T",
    ),
    (
        """
def cut_windows(ids, T, stride):
    return [(ids[i : i + T], ids[i + 1 : i + T + 1]) for i in range(0, len(ids) - T + 1, stride)]
""",
        "is shorter than its input",
    ),
    (
        """
def cut_windows(ids, T, stride):
    return [(ids[i : i + T], ids[i + 1 : i + T + 1]) for i in range(len(ids) - T)]
""",
        "the stride, here 3, is not used",
    ),
    (
        """
def cut_windows(ids, T, stride):
    return [(ids[i : i + T], ids[i + 1 : i + T + 1]) for i in range(0, len(ids) - T - 1, stride)]
""",
        "is the last one missing?",
    ),
    (
        """
def cut_windows(ids, T, stride):
    return [(ids[i : i + T], ids[i + 1 : i + T + 1]) for i in range(0, len(ids) - T, T)]
""",
        "the step is the stride",
    ),
    (
        """
def cut_windows(ids, T, stride):
    return [(ids[i : i + T], ids[i + T]) for i in range(0, len(ids) - T, stride)]
""",
        "a target has T ids, like the input",
    ),
    (
        """
def cut_windows(ids, T, stride):
    starts = range(0, len(ids) - T, stride)
    return [ids[i : i + T] for i in starts], [ids[i + 1 : i + T + 1] for i in starts]
""",
        "zip(inputs, targets) makes pairs",
    ),
    (
        """
def cut_windows(ids, T, stride):
    return [ids[i : i + T + 1] for i in range(0, len(ids) - T, stride)]
""",
        "make a pair (input, target) of each window",
    ),
]
WRONG["1.4"] = [
    (
        """
def tokens_and_positions(x, wte, wpe):
    return wte[x] + wpe[x]
""",
        "positions were looked up by token id",
    ),
    (
        """
def tokens_and_positions(x, wte, wpe):
    return wte[x] + wpe
""",
        "one token got all 11 positions",
    ),
    (
        """
def tokens_and_positions(x, wte, wpe):
    return wte[x] + wpe[: x.shape[0], None]
""",
        "each row of the batch got one position",
    ),
    (
        """
def tokens_and_positions(x, wte, wpe):
    return wte[x] + wpe[1 : x.shape[1] + 1]
""",
        "positions were counted from 1",
    ),
    (
        """
def tokens_and_positions(x, wte, wpe):
    return torch.cat([wte[x], wpe[: x.shape[1]].expand(*x.shape, -1)], dim=-1)
""",
        "do not concatenate",
    ),
    (
        """
def tokens_and_positions(x, wte, wpe):
    return wte[x]
""",
        "positions are missing",
    ),
    (
        """
def tokens_and_positions(x, wte, wpe):
    return wte[x] + wpe[: x.shape[0]]
""",
        "do you take T rows of wpe, and not B?",
    ),
    (
        """
def tokens_and_positions(x, wte, wpe):
    return wte(x) + wpe(torch.arange(x.shape[1]))
""",
        "the tables are plain tensors here",
    ),
    (
        """
def tokens_and_positions(x, wte, wpe):
    return wte[x] + wpe.weight[: x.shape[1]]
""",
        "the tables are plain tensors here",
    ),
    (
        """
def tokens_and_positions(x, wte, wpe):
    return wte[x] + wpe[x.shape[1]]
""",
        "one row of wpe was added at all positions",
    ),
]
