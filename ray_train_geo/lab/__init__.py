"""A lab: emulated hosts on one machine, with slow links between them (Linux; level 0).

``lab.Lab`` is what one uses.  What runs between the hosts - ``kernel``, ``host``, ``enter``,
``switch``, and what they import - imports next to nothing: these are processes of one thread, as
the kernel asks of who changes namespaces.
"""
