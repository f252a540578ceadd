"""The table of what score centering leaves, on a small vocabulary."""

from tools.score_centering_error import table


def test_a_whole_head_leaves_nothing_and_a_larger_one_less():
    lines = table((4, 16, 60), exponents=(1.5,), gaps=(0.05, 0.5), vocab_size=60, num_rows=4)
    header, rule, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert header[-1] == "left, K=60" and set(rule) == {"---"} and len(rows) == 4
    for row, (gap, weight) in zip(rows, [("0.05", "1"), ("0.05", "min(rho, 2)"), ("0.5", "1")]):
        assert (row[2], row[3]) == (gap, weight)
    assert rows[1][5:] == ["none"] * 3  # no rho is above 2
    for row in (rows[0], rows[2], rows[3]):
        shares = [float(cell.rstrip("%")) for cell in row[5:]]
        assert shares == sorted(shares, reverse=True) and shares[0] > 1.0 and shares[-1] == 0.0
