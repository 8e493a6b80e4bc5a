-- The requests of a load by wrk: bodies of a file in turn; at the end one line of JSON.
-- Arguments: the file; "lines" or "whole" (one body a line, or one in all); milliseconds that each connection waits
-- before a request; then headers as "name: value".
local made, turn = {}, 0

function init(args)
  local pause = tonumber(args[3])
  if pause > 0 then delay = function() return pause end end
  for i = 4, #args do
    local name, value = args[i]:match("^(.-): (.*)$")
    wrk.headers[name] = value
  end
  local file = assert(io.open(args[1], "rb"))
  if args[2] == "lines" then
    for line in file:lines() do made[#made + 1] = wrk.format("POST", nil, nil, line) end
  else
    made[1] = wrk.format("POST", nil, nil, file:read("*a"))
  end
  file:close()
end

function request()
  turn = turn % #made + 1
  return made[turn]
end

function done(summary, latency)
  local e = summary.errors
  local errors = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format('{"requests": %d, "seconds": %.6f, "errors": %d, "p50": %.3f, "p99": %.3f}\n',
    summary.requests, summary.duration / 1e6, errors, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
