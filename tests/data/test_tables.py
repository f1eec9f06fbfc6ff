import datetime
import gzip

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.data.tables import as_text_columns, epoch_seconds, read_lines, read_text, scan_table
from lasar.errors import ConfigError, DataError

ROWS = {"u": ["007", "b"], "i": ["x", "caf\u00e9"]}


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.csv", "u,i\n007,x\nb,caf\u00e9\n".encode()),
        ("e.csv.gz", "u,i\n007,x\nb,caf\u00e9\n".encode()),
        ("e.tsv", "u\ti\n007\tx\nb\tcaf\u00e9\n".encode()),
        ("e.jsonl", b'{"u": "007", "i": "x"}\n{"u": "b", "i": "caf\\u00e9"}\n'),
        ("e.json.gz", b'{"u": "007", "i": "x"}\n{"u": "b", "i": "caf\\u00e9"}\n'),
    ],
)
def test_every_kind_gives_the_same_table(tmp_path, name, content):
    assert scan_table(write(tmp_path / name, content)).collect().to_dict(as_series=False) == ROWS


def test_parquet(tmp_path):
    pl.DataFrame(ROWS).write_parquet(tmp_path / "e.parquet")
    assert scan_table(tmp_path / "e.parquet").collect().to_dict(as_series=False) == ROWS


def test_a_folder_of_parquet_parts_is_one_table_in_the_order_of_their_names(tmp_path):
    frame = pl.DataFrame(ROWS)
    frame[1:].write_parquet(tmp_path / "part-00001.parquet")
    frame[:1].write_parquet(tmp_path / "part-00000.parquet")
    assert scan_table(tmp_path).collect().to_dict(as_series=False) == ROWS
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a folder; this reader needs a file"):
        scan_table(tmp_path / "empty")


@pytest.mark.parametrize("name", ["e.csv", "e.csv.gz"])
def test_other_encodings(tmp_path, name):
    path = write(tmp_path / name, "u;i\n007;x\nb;caf\u00e9\n".encode("latin-1"))
    frame = scan_table(path, encoding="latin-1", separator=";")
    assert frame.collect().to_dict(as_series=False) == ROWS


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path):
    path = write(tmp_path / "e.csv", b"\xef\xbb\xbfu,i\n1,2\n")
    assert scan_table(path).collect_schema().names() == ["u", "i"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", b"", "the file is empty"),
        ("e.xlsx", b"PK", r"unknown kind '\.xlsx'; expected one of \.csv"),
        ("e.parquet", b"PAR1 no", "cannot be read"),
        ("e.jsonl", b'{"a": 1}\nno json\n', "cannot be read"),
        ("e.csv.gz", None, "no such file.*did you mean '.*e.csv'"),
    ],
)
def test_unusable_files_are_one_clear_line(tmp_path, name, content, message):
    if content is None:
        write(tmp_path / "e.csv", b"u\n1\n")
    else:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        scan_table(tmp_path / name).collect()
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_gzip_is_one_clear_line(tmp_path):
    whole = gzip.compress(b"line\n" * 10_000)
    path = tmp_path / "e.txt.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"e\.txt\.gz: cannot be read"):
        list(read_lines(path))
    with pytest.raises(DataError, match=r"e\.txt\.gz: cannot be read"):
        read_text(path)


def test_encodings_are_checked(tmp_path):
    path = write(tmp_path / "e.csv", "u\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="unknown encoding 'latin-11'; did you mean 'latin"):
        scan_table(path, encoding="latin-11")
    with pytest.raises(DataError, match=r"e\.csv: not ascii text \(byte 5\); set format\.encoding"):
        scan_table(path, encoding="ascii")
    with pytest.raises(ConfigError, match="one character"):
        scan_table(path, separator="::")


def seconds(values, time_format=None):
    frame = pl.DataFrame({"t": values})
    return frame.select(epoch_seconds("t", frame.schema["t"], time_format))["t"].to_list()


def test_times_of_any_usual_form():
    day = 1_577_836_800
    assert seconds(
        [
            "2020-01-01", "2020-01-01 00:00", "2020-01-01T00:00:01", "2020-01-01 00:00:01.5",
            "2020-01-01T00:00:00Z", "2020-01-01T00:00:00+02:00", str(day), str(day * 1000),
            str(day * 1_000_000), f"{day}.9", "soon", None,
        ]
    ) == [day, day, day + 1, day + 1, day, day - 7200, day, day, day, day, None, None]  # fmt: skip
    assert seconds([datetime.date(2020, 1, 1)]) == [day]
    assert seconds([datetime.datetime(2020, 1, 1, 0, 0, 7)]) == [day + 7]
    assert seconds([day, day + 1]) == [day, day + 1]
    assert seconds(["12/31/2019 23:59", "31/12/2019 1:00"], "%m/%d/%Y %H:%M") == [day - 60, None]
    assert seconds(["5000"], "milliseconds") == [5]
    assert seconds([f"{day * 1000}"], "seconds") == [day * 1000]


@given(st.datetimes(datetime.datetime(1971, 1, 1), datetime.datetime(2100, 1, 1)))
def test_iso_times_agree_with_the_standard_library(time):
    expected = int(time.replace(tzinfo=datetime.UTC, microsecond=0).timestamp())
    assert seconds([time.isoformat()]) == [expected]


def test_nested_columns_become_text():
    frame = pl.DataFrame(
        {"categories": [["a", "b"]], "tags": [["x", "y"]], "n": [3], "s": [{"k": 1}], "e": [None]}
    )
    text = as_text_columns(frame.lazy(), frame.columns).collect()
    assert set(text.schema.values()) == {pl.String()}
    assert text.row(0) == ("a > b", "x, y", "3", '{"k":1}', None)


def test_a_row_with_too_many_fields_suggests_the_separator(tmp_path):
    path = write(tmp_path / "e.csv", b"u,i\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"e\.csv: cannot be read: .*is format\.separator right"):
        scan_table(path, encoding="latin-1").collect()
