# crit of many images at once (each start of Python takes a quarter of a second). Reads lines of JSON from stdin:
#   {"decode": path, "pretty": bool}                 answers {"json": …} or {"error": …}
#   {"encode": json text, "to": path}   answers {} or {"error": …}
#   {"rpc": name of a message, "bytes": base64}   answers {"json": its fields}, by CRIU's own definitions of its RPC
import base64
import json
import sys

import pycriu
from google.protobuf.json_format import MessageToDict
from pycriu import rpc_pb2

for line in sys.stdin:
    ask = json.loads(line)
    try:
        if "decode" in ask:
            with open(ask["decode"], "rb") as image:
                answer = {"json": pycriu.images.load(image, ask.get("pretty", False))}
        elif "rpc" in ask:
            message = getattr(rpc_pb2, ask["rpc"])()
            message.ParseFromString(base64.b64decode(ask["bytes"]))
            unknown = message.UnknownFields() if hasattr(message, "UnknownFields") else []
            answer = {"json": MessageToDict(message, preserving_proto_field_name=True), "unknown": len(unknown)}
        else:
            with open(ask["to"], "wb") as image:
                pycriu.images.dump(json.loads(ask["encode"]), image)
            answer = {}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
