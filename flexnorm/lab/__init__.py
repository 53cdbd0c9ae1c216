"""The application on top of the library: experiments, report, profile, networks, data, the command line.

Needs ``pip install 'flexnorm[lab]'``.
"""
