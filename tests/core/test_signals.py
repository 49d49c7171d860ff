"""Stop signals: one wish however often it is sent, heard also where Python does not come back, and passed on from the parent."""
from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scepter.core.env import Stopped, we
from scepter.core.signals import ECHO, STOP_SIGNALS, Wish, listening

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def forget():
    yield
    we.stop_signal = 0


def test_what_comes_again_at_once_is_the_same_wish_and_later_a_second_one(monkeypatch: pytest.MonkeyPatch):
    now, wish = [100.0], Wish()
    monkeypatch.setattr('time.monotonic', lambda: now[0])

    assert [wish.hear(15), wish.hear(15), wish.hear(1)] == ['stop', 'echo', 'echo'] and not wish.is_second
    now[0] += ECHO
    assert [wish.hear(15), wish.hear(15)] == ['now', 'echo'] and wish.is_second and wish.number == 15


@pytest.mark.parametrize('number', STOP_SIGNALS)
def test_a_signal_ends_what_has_nothing_to_save_at_once_and_waits_for_what_has(number: int):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip('these tests were begun by nohup, whose wish is kept')
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Stopped), listening():
        signal.raise_signal(number)
    with listening(), we.saving_on_stop():
        signal.raise_signal(number)
        signal.raise_signal(number)      # as `timeout` does: to the process, then to its group
        assert we.stop_signal == number


@pytest.mark.skipif(sys.platform != 'linux', reason='calls libc')
def test_an_echo_whose_handler_comes_late_is_still_one_and_what_comes_later_is_not():
    libc, mutex, was_spared = ctypes.CDLL(None), ctypes.create_string_buffer(64), False
    libc.pthread_mutex_lock(mutex)
    with pytest.raises(Stopped), listening(), we.saving_on_stop():
        signal.raise_signal(signal.SIGTERM)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Timer(0.1 + 1.2 * ECHO, libc.pthread_mutex_unlock, (mutex,)).start()
        libc.pthread_mutex_lock(mutex)      # like a collective: Python runs no handler until it is back
        time.sleep(0.1)
        was_spared = we.stop_signal == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        pytest.fail('it was asked a second time')
    assert was_spared


def test_a_stop_that_something_swallowed_is_not_forgotten():
    with pytest.raises(Stopped), listening():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:    # what a careless library does
            pass
        with we.saving_on_stop():
            pytest.fail('the loop must not begin')


def test_nohup_is_respected_and_all_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = [signal.getsignal(n) for n in STOP_SIGNALS]
    try:
        with listening():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) != handlers[0]
        assert [signal.getsignal(n) for n in STOP_SIGNALS] == handlers and not we.stop_signal
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_waits_where_python_cannot_interrupt_it_ends_all_the_same():
    code = '''if True:
        import ctypes, threading
        from scepter.core import signals
        from scepter.core.env import guarded
        signals.GRACE = 0.2

        def main():
            with signals.listening():
                mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
                threading.Timer(0.5, lambda: print('ready', flush=True)).start()
                libc.pthread_mutex_lock(mutex)
                libc.pthread_mutex_lock(mutex)      # forever, like a collective whose peer does not come

        raise SystemExit(guarded(main))'''
    with subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == 'ready\n'
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 143 and 'SIGTERM: ended' in said


def test_a_child_hears_its_parent_once_and_dies_with_it():
    code = '''if True:
        import os, sys, time
        from multiprocessing import Pipe
        from scepter.core.env import guarded, we
        from scepter.core.signals import listening
        ours, theirs = Pipe(duplex=False)
        if child := os.fork():
            ours.close()
            for line in sys.stdin:
                theirs.send((15, line == 'now\\n'))
            os._exit(0)
        theirs.close()

        def main():
            with listening(ours), we.saving_on_stop():
                print('ready', os.getpid(), flush=True)
                while not we.stop_signal:
                    time.sleep(0.01)
                print('asked', we.stop_signal, flush=True)
                time.sleep(1000)

        code = guarded(main)
        print('code', code, flush=True)'''
    for is_asked_again in (True, False):
        with subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            child = int(process.stdout.readline().split()[1])
            process.stdin.write('stop\n')
            process.stdin.flush()
            os.kill(child, signal.SIGTERM)      # and from the group: still one wish
            assert process.stdout.readline() == 'asked 15\n'
            if is_asked_again:
                process.stdin.write('now\n')
                process.stdin.flush()
                assert process.stdout.readline() == 'code 143\n'
            process.kill()
            assert process.stdout.readlines() == []       # its end of the pipe is closed: the child is gone
