"""`manage.py doctor`: is everything here that Assistant needs, and what to do where it is not.

One file per family of checks. A check looks and returns findings; what can be decided without looking is a pure function of
its own. Checks change nothing, and work while the platform is down or a part of it is broken.
"""
