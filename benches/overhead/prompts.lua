-- wrk's requests: prompts of 2.4 KB, of which 64 share the first 1,600 bytes. The argument tells this run's tails from
-- those of any other; all else is the same in every run.

local prefix_count, prefix_bytes, tail_bytes, text_bytes = 64, 1600, 800, 100000
local prefixes, text, head, run
local count = 0

local function words(bytes)
  local made, length = {}, 0
  while length < bytes do
    local word = {}
    for at = 1, math.random(2, 7) do word[at] = string.char(math.random(97, 122)) end
    made[#made + 1] = table.concat(word)
    length = length + #word + 1
  end
  return table.concat(made, " "):sub(1, bytes)
end

function init(args)
  math.randomseed(7)
  prefixes = {}
  for at = 1, prefix_count do prefixes[at] = words(prefix_bytes) end
  text = words(text_bytes)
  run = args[1]
  head = "POST /generate HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port
    .. "\r\nContent-Type: application/json\r\nContent-Length: "
end

function request()
  count = count + 1
  local own = string.format(" %s-%x ", run, count)
  local at = math.random(text_bytes - tail_bytes)
  local body = '{"text":"' .. prefixes[math.random(prefix_count)] .. own .. text:sub(at, at + tail_bytes - #own - 1)
    .. '","sampling_params":{"max_new_tokens":8,"temperature":0},"stream":false}'
  return head .. #body .. "\r\n\r\n" .. body
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "secs": %.6f, "p50_us": %.1f, "p99_us": %.1f, "connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
