"""From verdicts to words: the terminal, JUnit properties, verdict.json and one static HTML page."""
