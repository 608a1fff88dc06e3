# crit of many images at once (each start of Python takes a quarter of a second). Reads lines of JSON from stdin:
#   {"decode": path, "pretty": bool}                 answers {"json": …} or {"error": …}
#   {"encode": json text, "to": path}   answers {} or {"error": …}
import json
import sys

import pycriu

for line in sys.stdin:
    ask = json.loads(line)
    try:
        if "decode" in ask:
            with open(ask["decode"], "rb") as image:
                answer = {"json": pycriu.images.load(image, ask.get("pretty", False))}
        else:
            with open(ask["to"], "wb") as image:
                pycriu.images.dump(json.loads(ask["encode"]), image)
            answer = {}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
