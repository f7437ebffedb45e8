"""The composition root: settings, servers, supervisor. It wires, and decides nothing. Nobody imports it."""
