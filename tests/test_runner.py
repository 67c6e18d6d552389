from lib import runner


def test_a_log_keeps_whole_lines_and_the_last_state_of_a_bar(tmp_path):
    with runner._Log(tmp_path / "logs" / "x.log") as log:
        for text in ("one\ntw", "o\n", "\r 10 %", "\r 90 %", "\r100 %\n", "unfinished"):
            log.write(text)
        assert log.last == "unfinished"
    assert (tmp_path / "logs" / "x.log").read_text() == "one\ntwo\n100 %\nunfinished\n"
