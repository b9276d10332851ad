import sys

from tests.architectures.table.row import row

for n in sys.argv[1:]:
    r = row(n)
    print(n, r["seconds"])
    for k, c in r["cells"].items():
        if c["state"] != "yes" or c["why"]:
            print("    ", k, ":", c["state"], c["why"][:230], f"{c['number']:.2g}", c["n"])
        elif k in (
            "sweep",
            "map",
            "lens",
            "paths",
            "knockout",
            "grafts",
            "attention mass",
            "attribution patching",
            "logit attribution",
        ):
            print("    ", k, ":", c["state"], f"{c['number']:.2g}", c["n"])
