def set_num_threads(n: int) -> None:
    """Use ``n`` threads (1 to 1024) in every later call of the CPU backend. Results do not depend on it.

    Raises ConfigError if ``n`` is not an int from 1 to 1024.
    """

def get_num_threads() -> int:
    """The number of threads the CPU backend uses."""
