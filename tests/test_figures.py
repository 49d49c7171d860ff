"""docs/reliability.md is written by the tests: a run replaces the rows that it has measured, and no others."""
from __future__ import annotations

import datetime

import pytest

import figures
from figures import HEAD, ROWS, Figure, cells


@pytest.fixture
def page(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(f'# Title\n\n{HEAD}| {[*ROWS][2]} | all | 3 of 3 | 2020-01-01 | another |\n\nThe end.\n')
    return page


def test_a_run_replaces_its_own_rows_and_leaves_the_others_with_their_date(page):
    first, second = [*ROWS][:2]
    figures.write([Figure(second, 5, of=6), Figure(first, 1, 1), Figure(first, 1, 1)], page)
    figures.write([Figure(first, 3, 3)], page)
    head, rows, end = page.read_text().partition(HEAD)[0], page.read_text().split('\n')[4:7], page.read_text().split('\n')[7:]

    assert head == '# Title\n\n' and end == ['', 'The end.', '']
    assert rows[0].startswith(f'| {first} | {ROWS[first][0]} | 3 of 3 | {datetime.date.today()} | ') and '| 5 of 6 |' in rows[1]
    assert rows[2].endswith('| 2020-01-01 | another |')


def test_cases_are_added_up_and_of_measurements_the_worst_is_told():
    seconds = next(name for name, (_, unit) in ROWS.items() if unit == 's')
    cases = next(name for name, (_, unit) in ROWS.items() if not unit)

    assert cells([Figure(seconds, 1.5), Figure(seconds, 2.25), Figure(cases, 1, 1)], seconds) == '2.2 s'
    assert cells([Figure(cases, 900, 1000), Figure(cases, 0, 1)], cases) == '900 of 1,001'


def test_the_page_holds_no_row_that_is_written_by_hand():
    rows = [line for line in figures.PAGE.read_text(encoding='utf-8').partition(HEAD)[2].splitlines() if line.startswith('|')]
    assert {row.split('|')[1].strip() for row in rows} <= ROWS.keys()
