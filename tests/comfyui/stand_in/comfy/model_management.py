"""The flag that a user's Cancel sets, and memory."""

interrupted = False
unloaded = 0


class InterruptProcessingException(Exception):
    pass


def processing_interrupted():
    return interrupted


def interrupt_current_processing(value=True):
    global interrupted
    interrupted = value


def throw_exception_if_processing_interrupted():
    global interrupted
    if interrupted:
        interrupted = False
        raise InterruptProcessingException()


def unload_all_models():
    global unloaded
    unloaded += 1


def soft_empty_cache():
    pass


def intermediate_device():
    return "cpu"
