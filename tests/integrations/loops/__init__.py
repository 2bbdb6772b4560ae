"""Jobs of warm worlds that train in other people's loops, beside a plain one."""
