"""On PYTHONPATH it makes every Python process measure its lines, those that tests start, too: make coverage."""

import coverage

coverage.process_startup()
