"""Command lines of tests."""


def replaced(words, **values):
    """Other values of flags; `None` leaves one out."""
    words = list(words)
    for name, value in values.items():
        flag = f"--{name}"
        if flag in words:
            index = words.index(flag)
            stop = next((i for i in range(index + 1, len(words)) if words[i].startswith("--")), len(words))
            del words[index:stop]
        if value is not None:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words
