"""Broken scans and folders: each is refused by name with its cure, or read right; good ones beside it come through."""

import pytest

from benchmarks import malformed
from lib import volumes
from lib.errors import CourseError

BROKEN = [name for name, case in malformed.CASES.items() if case.code]
GOOD = [name for name, case in malformed.CASES.items() if not case.code]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name_with_its_cure(tmp_path, name):
    case = malformed.CASES[name]
    path = case.write(tmp_path)
    with pytest.raises(CourseError) as caught, case.around(path):
        volumes.read(path, constant_allowed=case.mask)
    assert (caught.value.code, str(path) in caught.value.what) == (case.code, True), caught.value
    assert caught.value.cure.strip()


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_but_good_file_is_the_good_scan(tmp_path, name):
    case = malformed.CASES[name]
    assert case.right(volumes.read(case.write(tmp_path)))
