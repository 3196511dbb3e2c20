"""Text that fits into a message of one line."""

from detr_dist.text import list_names, one_line, printable, value_of


def test_an_error_is_truncated_after_its_credentials_are_removed() -> None:
    address = "postgresql://user:Sup3rSecretPassw0rd@host/database"
    for length in range(240, 300):
        assert "Sup3r" not in one_line(RuntimeError("x" * length + " " + address))


def test_lines_are_joined_and_long_ones_truncated() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("x" * 400, 10) == "xxxxxxx..."
    assert value_of("x" * 100, 10) == "'xxxxxx..."


def test_the_first_names_are_listed_and_the_others_counted() -> None:
    assert list_names("ab") == "'a', 'b'"
    assert list_names([*"abcd", 5, 6]) == "'a', 'b', 'c', 'd' and 2 more"
    assert list_names(["ü"], in_ascii=True) == r"'\xfc'"


def test_control_characters_are_escaped() -> None:
    assert printable("ball") == "ball"
    assert printable("a\x1bb") == r"'a\x1bb'"
