"""TensorBoard's events on a disk that does not take them."""

import threading

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_llm.callbacks.event_log import EventLog
from lit_llm.storage import CannotWrite
from tests.test_storage import files_of_at_most


@pytest.fixture(autouse=True)
def hook_of_before():
    before = threading.excepthook
    yield
    threading.excepthook = before


def event_log(folder) -> EventLog:
    return EventLog(save_dir=str(folder), name="run", version=0)


def scalars(logger):
    for step in range(1000):
        logger.log_metrics({"loss": 1.0}, step)
        logger.save()


def texts(logger):
    for step in range(1000):
        logger.experiment.add_text("config", "x" * 100, step)
    logger.experiment.flush()


@pytest.mark.parametrize("write", [scalars, texts])
def test_events_that_the_disk_does_not_take_name_their_folder_and_show_no_traceback(write, tmp_path, capfd):
    logger = event_log(tmp_path)
    with files_of_at_most(3000):
        with pytest.raises(CannotWrite, match=r"run/version_0 could not be written: File too large .*free there"):
            write(logger)
        logger.finalize("failed")  # the message of what ended the run stays the last one
    assert "Traceback" not in capfd.readouterr().err


def test_a_disk_that_is_full_at_the_last_event_is_told_too(tmp_path):
    logger = event_log(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    with files_of_at_most(60), pytest.raises(CannotWrite, match="run/version_0"):
        logger.log_metrics({"loss": 1.0}, 1)
        logger.finalize("success")


def test_another_error_of_another_thread_is_told_as_before(tmp_path):
    told = []
    threading.excepthook = lambda arguments: told.append(arguments.exc_type)
    event_log(tmp_path).log_metrics({"loss": 1.0}, 0)
    threads = [threading.Thread(target=open, args=(tmp_path / "none",)), threading.Thread(target=int, args=("x",))]
    for thread in threads:
        thread.start()
        thread.join()
    assert told == [FileNotFoundError, ValueError]


def test_events_are_those_of_lightning(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for kind in (EventLog, TensorBoardLogger):
        logger = kind(save_dir=str(tmp_path), name=kind.__name__, version=0)
        for step in range(3):
            logger.log_metrics({"loss": step / 2}, step)
        logger.finalize("success")
        events = EventAccumulator(logger.log_dir).Reload().Scalars("loss")
        assert [(event.step, event.value) for event in events] == [(0, 0.0), (1, 0.5), (2, 1.0)]
        assert len(list((tmp_path / kind.__name__ / "version_0").glob("events*"))) == 1
