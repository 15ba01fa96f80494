"""The programs that a comparison measures: the engine and its peers. Each runs in a process of its own."""
