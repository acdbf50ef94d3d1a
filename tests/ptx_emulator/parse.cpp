// PTX text to Program: directives, scopes, labels, operands. What an instruction means is in the families.
#include <algorithm>
#include <cctype>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "decode.h"

namespace ptx {

std::string format(const char* pattern, ...) {
  char buffer[1024];
  va_list list;
  va_start(list, pattern);
  std::vsnprintf(buffer, sizeof buffer, pattern, list);
  va_end(list);
  return buffer;
}

static bool word_character(char c) { return std::isalnum(u8(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }

static std::string trim(const std::string& s) {
  size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

// Cuts at commas outside brackets.
static std::vector<std::string> split(const std::string& s, char at = ',') {
  std::vector<std::string> parts;
  int depth = 0;
  std::string part;
  for (char c : s) {
    depth += c == '{' || c == '[' || c == '(';
    depth -= c == '}' || c == ']' || c == ')';
    if (c == at && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

static std::vector<std::string> words(const std::string& s) {
  std::vector<std::string> found;
  size_t i = 0;
  while (i < s.size()) {
    while (i < s.size() && std::isspace(u8(s[i]))) ++i;
    size_t j = i;
    while (j < s.size() && !std::isspace(u8(s[j]))) ++j;
    if (j > i) found.push_back(s.substr(i, j - i));
    i = j;
  }
  return found;
}

Type type_named(const std::string& name) {
  static const std::unordered_map<std::string, Type> types = {
      {"b8", {'b', 8}},       {"b16", {'b', 16}},      {"b32", {'b', 32}},      {"b64", {'b', 64}},     {"b128", {'b', 128}},
      {"u8", {'u', 8}},       {"u16", {'u', 16}},      {"u32", {'u', 32}},      {"u64", {'u', 64}},     {"s8", {'s', 8}},
      {"s16", {'s', 16}},     {"s32", {'s', 32}},      {"s64", {'s', 64}},      {"f16", {'f', 16}},     {"f32", {'f', 32}},
      {"f64", {'f', 64}},     {"bf16", {'h', 16}},     {"f16x2", {'f', 16, 2}}, {"bf16x2", {'h', 16, 2}}, {"f32x2", {'f', 32, 2}},
      {"tf32", {'t', 32}},    {"e4m3", {'e', 8}},      {"e5m2", {'g', 8}},      {"e4m3x2", {'e', 8, 2}}, {"e5m2x2", {'g', 8, 2}},
      {"pred", {'p', 1}},     {"u16x2", {'u', 16, 2}}, {"s16x2", {'s', 16, 2}},
  };
  auto it = types.find(name);
  return it == types.end() ? Type{} : it->second;
}

struct Scope {
  std::unordered_map<std::string, Op> registers;
  std::unordered_map<std::string, u32> labels;
  std::unordered_map<std::string, Variable> variables;
  std::vector<std::pair<u32, std::string>> branches;  // instruction, label
};

struct Parser {
  std::string text;
  std::string entry;
  Program program;
  std::vector<Scope> scopes{Scope{}};  // module, function, blocks
  std::map<std::pair<u64, u32>, Op> constants;
  std::map<std::string, u32> param_places;
  u32 line = 1;
  size_t at = 0;
  u32 shared_top = 0;
  bool found = false;

  [[noreturn]] void fail(const std::string& what, u32 number = 0) { throw Error(format("line %u: ", number ? number : line) + what); }

  // Comments become blanks, so that lines keep their numbers.
  void strip_comments() {
    for (size_t i = 0; i + 1 < text.size(); ++i) {
      if (text[i] == '"') {
        while (++i < text.size() && text[i] != '"' && text[i] != '\n') {}
      } else if (text[i] == '/' && text[i + 1] == '/') {
        while (i < text.size() && text[i] != '\n') text[i++] = ' ';
      } else if (text[i] == '/' && text[i + 1] == '*') {
        for (; i < text.size() && !(text[i] == '*' && text[i + 1] == '/'); ++i)
          if (text[i] != '\n') text[i] = ' ';
        text[i] = text[i + 1] = ' ';
      }
    }
  }

  void skip_blank() {
    while (at < text.size() && std::isspace(u8(text[at]))) line += text[at++] == '\n';
  }

  std::string peek_word() {
    size_t j = at;
    while (j < text.size() && word_character(text[j])) ++j;
    return text.substr(at, j - at);
  }

  std::string to_end_of_line() {
    size_t j = text.find('\n', at);
    if (j == std::string::npos) j = text.size();
    std::string s = text.substr(at, j - at);
    at = j;
    return trim(s);
  }

  // Up to the first of `ends` outside brackets; the end itself is left.
  std::string upto(const char* ends) {
    int depth = 0;
    size_t start = at;
    for (; at < text.size(); ++at) {
      char c = text[at];
      if (depth == 0 && std::strchr(ends, c)) break;
      depth += c == '{' || c == '[' || c == '(';
      depth -= c == '}' || c == ']' || c == ')';
      line += c == '\n';
    }
    if (at == text.size()) fail("the text ends within a statement");
    return trim(text.substr(start, at - start));
  }

  void skip_braces() {
    int depth = 0;
    for (; at < text.size(); ++at) {
      line += text[at] == '\n';
      depth += text[at] == '{';
      if (text[at] == '}' && --depth == 0) {
        ++at;
        return;
      }
    }
    fail("a brace is never closed");
  }

  Op place(u32 bytes) {
    u32 size = bytes ? bytes * LANES : 4;
    u32 to = program.register_bytes;
    u32 align = std::min(size, 128u);  // each vector of 32-bit lanes has 128 bytes of its own
    to = (to + align - 1) / align * align;
    program.register_bytes = to + size;
    return Op{to, u8(bytes), false, false};
  }

  Op constant(u64 value, u32 bytes) {
    if (bytes == 0) value = value ? FULL : 0;
    if (bytes && bytes < 8) value &= (1ull << (8 * bytes)) - 1;
    auto [it, fresh] = constants.try_emplace({value, bytes});
    if (fresh) {
      it->second = place(bytes);
      it->second.constant = true;
      std::vector<u8> filled;
      for (int l = 0; l < (bytes ? LANES : 1); ++l)
        filled.insert(filled.end(), reinterpret_cast<u8*>(&value), reinterpret_cast<u8*>(&value) + (bytes ? bytes : 4));
      program.fill.emplace_back(it->second.at, filled);
    }
    return it->second;
  }

  const Op* find_register(const std::string& name) {
    for (size_t i = scopes.size(); i-- > 0;) {
      auto it = scopes[i].registers.find(name);
      if (it != scopes[i].registers.end()) return &it->second;
    }
    return nullptr;
  }
  const Variable* find_variable(const std::string& name) {
    for (size_t i = scopes.size(); i-- > 0;) {
      auto it = scopes[i].variables.find(name);
      if (it != scopes[i].variables.end()) return &it->second;
    }
    return nullptr;
  }

  static bool special_name(const std::string& s) {
    static const char* names[] = {"%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%warpid", "%nwarpid", "%lanemask_", "%clusterid.",
                                  "%nclusterid.", "%cluster_ctaid.", "%cluster_nctaid.", "%cluster_ctarank", "%cluster_nctarank",
                                  "%dynamic_smem_size", "%total_smem_size", "%smid", "%nsmid", "%gridid", "%is_explicit_cluster", "%clock",
                                  "%globaltimer"};
    return std::any_of(std::begin(names), std::end(names), [&](const char* n) { return s.rfind(n, 0) == 0; });
  }

  // A number as PTX writes it, in `bytes` bytes.
  bool number(const std::string& s, u32 bytes, u64& value) {
    if (s.empty()) return false;
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) {
      value = std::strtoull(s.c_str() + 2, nullptr, 16);
      return true;
    }
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) {
      value = std::strtoull(s.c_str() + 2, nullptr, 16);
      return true;
    }
    size_t digit = s[0] == '-' || s[0] == '+';
    if (digit >= s.size() || !std::isdigit(u8(s[digit]))) return false;
    bool hex = s.size() > digit + 1 && (s[digit + 1] == 'x' || s[digit + 1] == 'X');
    if (!hex && s.find('.') != std::string::npos) {
      double d = std::strtod(s.c_str(), nullptr);
      if (bytes == 4) {
        float f = float(d);
        u32 bits;
        std::memcpy(&bits, &f, 4);
        value = bits;
      } else {
        std::memcpy(&value, &d, 8);
      }
      return true;
    }
    char* end = nullptr;
    u64 magnitude = std::strtoull(s.c_str() + digit, &end, 0);
    while (*end == 'U' || *end == 'u') ++end;
    if (*end) return false;
    value = s[0] == '-' ? 0 - magnitude : magnitude;
    return true;
  }

  // Address of a variable or parameter as a number: an offset in its space (shared, local, param) or a full address (global).
  bool symbol(const std::string& name, u64& value, std::string* space = nullptr) {
    if (const Variable* v = find_variable(name)) {
      value = v->space == "global" || v->space == "const" ? program.globals_address + v->at : v->at;
      if (space) *space = v->space;
      return true;
    }
    auto it = param_places.find(name);
    if (it == param_places.end()) return false;
    value = it->second;
    if (space) *space = "param";
    return true;
  }

  // ---- directives ----

  void declare_registers(const std::string& rest) {  // ".b32 %r<299>" or ".pred p, q"
    auto parts = words(rest);
    Type type = type_named(parts.at(0).substr(1));
    if (!type) fail("registers of unknown type " + parts[0]);
    u32 bytes = type.kind == 'p' ? 0 : std::max(type.bytes(), 2u);
    for (const std::string& name : split(rest.substr(parts[0].size()))) {
      size_t angle = name.find('<');
      if (angle == std::string::npos) {
        scopes.back().registers[name] = place(bytes);
      } else {
        u32 count = std::strtoul(name.c_str() + angle + 1, nullptr, 10);
        for (u32 i = 0; i < count; ++i) scopes.back().registers[name.substr(0, angle) + std::to_string(i)] = place(bytes);
      }
    }
  }

  void declare_variable(const std::string& statement) {  // ".extern .shared .align 16 .b8 global_smem[]"
    std::string head = statement, initial;
    size_t equals = statement.find('=');
    if (equals != std::string::npos) head = trim(statement.substr(0, equals)), initial = trim(statement.substr(equals + 1));
    std::string space;
    u32 align = 0, bytes = 0;
    bool external = false, open = false;
    Type type;
    auto parts = words(head);
    std::string name;
    for (size_t i = 0; i < parts.size(); ++i) {
      const std::string& p = parts[i];
      if (p == ".shared" || p == ".global" || p == ".const" || p == ".local") space = p.substr(1);
      else if (p == ".align") align = std::strtoul(parts.at(++i).c_str(), nullptr, 10);
      else if (p == ".extern") external = true;
      else if (p == ".visible" || p == ".weak" || p == ".common") continue;
      else if (p[0] == '.' && type_named(p.substr(1))) type = type_named(p.substr(1));
      else if (p[0] != '.') name += p;
      else if (p.rfind(".attribute", 0) == 0) continue;
      else fail("unknown word " + p + " in a declaration");
    }
    if (!type || space.empty()) fail("cannot read the declaration " + head);
    u32 count = 1;
    size_t bracket = name.find('[');
    for (size_t b = bracket; b != std::string::npos; b = name.find('[', b + 1)) {
      std::string inside = name.substr(b + 1, name.find(']', b) - b - 1);
      if (inside.empty()) open = true;
      else count *= std::strtoul(inside.c_str(), nullptr, 0);
    }
    name = name.substr(0, bracket);
    align = std::max(align, type.bytes());
    bytes = open ? 0 : count * type.bytes();
    u32 to = 0;
    auto take = [&](u32& top) {
      top = (top + align - 1) / align * align;
      to = top;
      top += bytes;
    };
    if (space == "shared") {
      if (open && external) {
        pending_dynamic.push_back({name, align, scopes.size() - 1});
        return;
      }
      take(shared_top);
    } else if (space == "local") {
      take(program.local_bytes);
    } else {
      u32 top = program.globals.size();
      take(top);
      program.globals.resize(top);
      if (!initial.empty()) {
        std::string list = initial[0] == '{' ? initial.substr(1, initial.size() - 2) : initial;
        u32 i = 0;
        for (std::string item : split(list)) {
          u64 value;
          if (!number(item, type.bytes(), value)) fail("cannot read the initial value " + item);
          if (i + type.bytes() > bytes) fail("too many initial values");
          std::memcpy(program.globals.data() + to + i, &value, type.bytes());
          i += type.bytes();
        }
      }
    }
    scopes.back().variables[name] = {space, to, bytes, align};
  }
  struct Dynamic {
    std::string name;
    u32 align;
    size_t scope;
  };
  std::vector<Dynamic> pending_dynamic;  // extern shared arrays: they begin where the static ones end

  void place_dynamic() {
    u32 align = 16;
    for (auto& d : pending_dynamic) align = std::max(align, d.align);
    shared_top = (shared_top + align - 1) / align * align;
    for (auto& d : pending_dynamic) scopes[d.scope].variables[d.name] = {"shared", shared_top, 0, d.align};
  }

  void parse_params(const std::string& list) {
    for (const std::string& item : split(list)) {
      auto parts = words(item);
      u32 align = 0;
      Type type;
      std::string name;
      for (size_t i = 0; i < parts.size(); ++i) {
        if (parts[i] == ".align") {
          u32 n = std::strtoul(parts.at(i + 1).c_str(), nullptr, 10);
          if (!type) align = n;  // after .ptr it describes what the pointer points to
          else if (std::find(parts.begin(), parts.begin() + i, ".ptr") == parts.begin() + i) align = n;
          ++i;
        } else if (parts[i][0] == '.' && type_named(parts[i].substr(1))) {
          type = type_named(parts[i].substr(1));
        } else if (parts[i][0] != '.') {
          name = parts[i];
        }
      }
      u32 count = 1;
      size_t bracket = name.find('[');
      if (bracket != std::string::npos) count = std::strtoul(name.c_str() + bracket + 1, nullptr, 0);
      name = name.substr(0, bracket);
      u32 bytes = type.bytes() * count;
      align = std::max(align, type.bytes());
      u32 to = (program.param_bytes + align - 1) / align * align;
      program.params.push_back({to, bytes, align});
      program.param_bytes = to + bytes;
      param_places[name] = to;
    }
  }

  // ---- instructions ----

  static const std::unordered_map<std::string, Decoder>& decoders() {
    static const auto all = [] {
      std::unordered_map<std::string, Decoder> table;
      for (const Family* f : {&arithmetic_family(), &convert_family(), &memory_family(), &matrix_family(), &control_family(), &async_family(), &wgmma_family()})
        for (auto& [name, decoder] : f->table) table[name] = decoder;
      return table;
    }();
    return all;
  }

  void instruction(const std::string& statement, u32 number) {
    Line l;
    l.parser = this;
    l.number = number;
    Inst inst;
    inst.line = number;
    inst.index = program.code.size();
    program.texts.push_back(std::make_unique<std::string>(statement));
    inst.text = program.texts.back()->c_str();
    std::string rest = statement;
    if (rest[0] == '@') {
      size_t end = 1;
      while (end < rest.size() && !std::isspace(u8(rest[end]))) ++end;
      std::string name = rest.substr(1, end - 1);
      bool negated = name[0] == '!';
      if (negated) name = name.substr(1);
      const Op* p = find_register(name);
      if (!p || p->bytes) fail("no predicate " + name, number);
      inst.guard = *p;
      inst.guard.negated = negated;
      rest = trim(rest.substr(end));
    }
    size_t end = 0;
    while (end < rest.size() && !std::isspace(u8(rest[end])) && rest[end] != '[' && rest[end] != '{') ++end;
    std::string opcode = rest.substr(0, end);
    for (size_t i = 0, start = 0; i <= opcode.size(); ++i)
      if (i == opcode.size() || opcode[i] == '.') {
        std::string part = opcode.substr(start, i - start);
        if (start == 0) l.name = part;
        else l.mods.push_back(part);
        start = i + 1;
      }
    for (const std::string& text : split(rest.substr(end))) {
      Operand o{text, text[0] == '[', {}};
      std::string inner = text;
      if (o.address) {
        if (text.back() != ']') fail("cannot read the operand " + text, number);
        inner = trim(text.substr(1, text.size() - 2));
        o.items = split(inner);
      } else if (text[0] == '{') {
        for (std::string item : split(text.substr(1, text.rfind('}') - 1))) o.items.push_back(item);
      } else if (text.find('|') != std::string::npos) {
        o.items = split(text, '|');
      } else {
        o.items = {text};
      }
      l.operands.push_back(o);
    }
    auto it = decoders().find(l.name);
    if (it == decoders().end()) l.fail("unknown instruction");
    it->second(l, inst);
    if (!inst.run && inst.flow == Flow::next) l.fail("unknown variant of this instruction");
    l.done();
    program.operands.push_back(std::make_unique<Op[]>(l.ops.size()));
    std::copy(l.ops.begin(), l.ops.end(), program.operands.back().get());
    inst.op = program.operands.back().get();
    inst.ops = l.ops.size();
    program.code.push_back(inst);
  }

  void close_scope() {
    Scope& s = scopes.back();
    bool outermost = scopes.size() == 2;  // the function's
    for (auto& [index, label] : s.branches) {
      auto it = s.labels.find(label);
      if (it != s.labels.end()) program.code[index].target = it->second;
      else if (outermost) fail("no label " + label, program.code[index].line);
      else scopes[scopes.size() - 2].branches.emplace_back(index, label);
    }
    scopes.pop_back();
  }

  void function_body() {
    ++at;  // {
    scopes.emplace_back();
    bool placed = false;
    for (size_t floor = scopes.size() - 1; scopes.size() > floor;) {
      skip_blank();
      if (at >= text.size()) fail("the text ends within a function");
      if (text[at] == '{') {
        scopes.emplace_back();
        ++at;
        continue;
      }
      if (text[at] == '}') {
        ++at;
        close_scope();
        continue;
      }
      if (text[at] == ';') {
        ++at;
        continue;
      }
      std::string word = peek_word();
      if (word == ".loc" || word == ".file") {
        to_end_of_line();
        continue;
      }
      size_t after = at + word.size();
      while (after < text.size() && (text[after] == ' ' || text[after] == '\t')) ++after;
      if (!word.empty() && word[0] != '.' && after < text.size() && text[after] == ':' && text[after + 1] != ':') {
        scopes.back().labels[word] = program.code.size();
        at = after + 1;
        continue;
      }
      u32 number = line;
      std::string statement = upto(";");
      ++at;
      if (word == ".reg") declare_registers(trim(statement.substr(4)));
      else if (word == ".pragma" || word == ".branchtargets") continue;
      else if (word[0] == '.') declare_variable(statement);
      else {
        if (!placed) place_dynamic(), placed = true;
        instruction(statement, number);
      }
    }
    Inst end;  // running off the end is an exit
    end.flow = Flow::exit;
    end.kind = CONTROL;
    end.line = line;
    end.text = "}";
    end.index = program.code.size();
    program.code.push_back(end);
  }

  void module() {
    while (true) {
      skip_blank();
      if (at >= text.size()) break;
      std::string word = peek_word();
      if (word == ".version" || word == ".address_size" || word == ".file") {
        to_end_of_line();
      } else if (word == ".target") {
        std::string rest = to_end_of_line();
        size_t sm = rest.find("sm_");
        if (sm == std::string::npos) fail("no sm_ in .target");
        program.target = std::strtoul(rest.c_str() + sm + 3, nullptr, 10);
      } else if (word == ".section") {
        upto("{");
        skip_braces();
      } else {
        u32 number = line;
        std::string head = upto("{;=(");
        bool function = head.find(".entry") != std::string::npos || head.find(".func") != std::string::npos;
        if (!function) {
          std::string statement = head;
          if (text[at] != ';') statement += upto(";");
          ++at;
          if (head.rfind(".extern .func", 0) != 0 && head.rfind(".pragma", 0) != 0) declare_variable(statement);
          continue;
        }
        auto parts = words(head);
        bool wanted = head.find(".entry") != std::string::npos && (entry.empty() || parts.back() == entry);
        std::string params;
        if (text[at] == '(') {
          params = upto("{;");
        }
        if (text[at] == ';') {
          ++at;
          continue;
        }
        if (!wanted || found) {
          skip_braces();
          continue;
        }
        found = true;
        program.entry = parts.back();
        size_t close = params.rfind(')');
        std::string directives = close == std::string::npos ? params : params.substr(close + 1);
        if (close != std::string::npos) parse_params(params.substr(1, close - 1));
        read_limits(directives);
        (void)number;
        // Variables may be declared after the function that uses them only in other modules: PTX declares before use.
        function_body();
      }
    }
    if (!found) throw Error(entry.empty() ? "the text has no .entry" : "the text has no .entry " + entry);
  }

  void read_limits(const std::string& directives) {
    auto parts = words(directives);
    for (size_t i = 0; i < parts.size(); ++i) {
      const std::string name = parts[i];
      if (name[0] != '.') continue;
      std::string list;
      while (i + 1 < parts.size() && parts[i + 1][0] != '.') list += parts[++i];
      auto texts = split(list);
      u32 n[3];
      for (size_t k = 0; k < 3; ++k) n[k] = k < texts.size() ? std::strtoul(texts[k].c_str(), nullptr, 10) : 1;
      if (name == ".reqntid") std::copy(n, n + 3, program.required_threads);
      if (name == ".reqnctapercluster") std::copy(n, n + 3, program.required_cluster);
      if (name == ".reqntid" || name == ".maxntid") program.most_threads = n[0] * n[1] * n[2];
      if (name == ".maxnreg") program.most_registers = n[0];
      if (name == ".minnctapersm") program.least_blocks = n[0];
    }
  }
};

// ---- Line ----

void Line::fail(const std::string& what) const {
  std::string opcode = name;
  (void)opcode;
  throw Error(format("line %u: ", number) + what + ": `" + *parser->program.texts.back() + "`");
}
bool Line::has(const std::string& mod) const { return std::find(mods.begin(), mods.end(), mod) != mods.end(); }
bool Line::take(const std::string& mod) {
  auto it = std::find(mods.begin(), mods.end(), mod);
  if (it == mods.end()) return false;
  mods.erase(it);
  return true;
}
Type Line::take_type() {
  for (size_t i = 0; i < mods.size(); ++i)
    if (Type t = type_named(mods[i])) {
      mods.erase(mods.begin() + i);
      types.push_back(t);
      return t;
    }
  fail("no type among the modifiers");
}
void Line::want(size_t count) { want(count, count); }
void Line::want(size_t least, size_t most) {
  if (operands.size() < least || operands.size() > most) fail("unexpected number of operands");
}
void Line::done() {
  if (!mods.empty()) fail("unknown modifier ." + mods[0]);
}

void Line::push(const std::string& item, u32 bytes, bool exact) {
  if (item == "_") {  // a sink: a register nobody reads
    ops.push_back(parser->place(bytes));
    return;
  }
  if (const Op* r = parser->find_register(item)) {
    if (exact && r->bytes != bytes) fail(format("%s has %u bytes, the instruction takes %u", item.c_str(), r->bytes, bytes));
    ops.push_back(*r);
    return;
  }
  u64 value;
  if (parser->number(item, bytes, value)) {
    ops.push_back(parser->constant(value, bytes));
    return;
  }
  if (item == "WARP_SZ") {
    ops.push_back(parser->constant(32, bytes));
    return;
  }
  std::string space;
  if (parser->symbol(item, value, &space)) {
    // The address of a kernel parameter, taken without cvta, is an offset in the param space.
    ops.push_back(parser->constant(value, bytes));
    return;
  }
  if (Parser::special_name(item)) {
    auto [it, fresh] = parser->program.specials.try_emplace(item);
    if (fresh) it->second = parser->place(item == "%clock64" || item == "%globaltimer" || item == "%gridid" ? 8 : 4);
    if (exact && it->second.bytes != bytes) fail(item + " has another width than the instruction");
    Op op = it->second;
    op.constant = true;
    ops.push_back(op);
    return;
  }
  size_t plus = item.find('+');
  if (plus != std::string::npos && parser->symbol(trim(item.substr(0, plus)), value)) {
    u64 more;
    if (parser->number(trim(item.substr(plus + 1)), 8, more)) {
      ops.push_back(parser->constant(value + more, bytes));
      return;
    }
  }
  fail("unknown operand " + item);
}
void Line::push_all(size_t operand, u32 bytes, bool exact) {
  for (auto& item : operands.at(operand).items) push(item, bytes, exact);
}
void Line::push_predicate(const std::string& item) {
  if (item == "_") {
    ops.push_back(parser->place(0));
    return;
  }
  std::string name = item;
  bool negated = name[0] == '!';
  if (negated) name = trim(name.substr(1));
  if (const Op* r = parser->find_register(name)) {
    if (r->bytes) fail(name + " is no predicate");
    ops.push_back(*r);
    ops.back().negated = negated;
    return;
  }
  u64 value;
  if (!parser->number(name, 4, value)) fail("unknown predicate " + name);
  ops.push_back(parser->constant((value != 0) != negated, 0));
}
void Line::push_address(size_t operand, Inst& inst, u32 bytes) {
  const Operand& o = operands.at(operand);
  std::string base = o.address ? o.items.at(0) : o.text;
  inst.offset = 0;
  // base, base + number, base+-number, number
  size_t cut = base.find_first_of("+-", 1);
  u64 value;
  if (parser->number(base, 8, value)) {
    push("0", bytes);
    inst.offset = i64(value);
    return;
  }
  if (cut != std::string::npos) {
    std::string more = trim(base.substr(base[cut] == '+' ? cut + 1 : cut));
    if (!parser->number(more, 8, value)) fail("cannot read the address " + base);
    inst.offset = i64(value);
    base = trim(base.substr(0, cut));
  }
  const Op* r = parser->find_register(base);
  if (r) {
    if (r->bytes != 4 && r->bytes != 8) fail("an address register has 4 or 8 bytes");
    ops.push_back(*r);
    return;
  }
  if (!parser->symbol(base, value)) fail("unknown address " + base);
  push("0", bytes);
  inst.offset += i64(value);
}

std::string space_of(Line& l, const std::string& item) {
  std::string base = trim(item.substr(0, item.find('+'))), space;
  u64 value;
  l.parser->symbol(base, value, &space);
  return space;
}
void branch_to(Line& l, Inst& inst, const std::string& label) { l.parser->scopes.back().branches.emplace_back(inst.index, label); }
Program& program_of(Line& l) { return l.parser->program; }

Program parse(const std::string& text, const std::string& entry) {
  Parser p;
  p.text = text + "\n";
  p.entry = entry;
  p.program.globals_address = 0x0000500000000000ull;
  p.strip_comments();
  // From sm_90 on the first KiB of shared memory belongs to the system.
  size_t sm = text.find("sm_");
  u32 target = sm == std::string::npos ? 80 : std::strtoul(text.c_str() + sm + 3, nullptr, 10);
  p.program.shared_base = target >= 90 ? 1024 : 0;
  p.shared_top = p.program.shared_base;
  p.module();
  p.program.shared_static = p.shared_top - p.program.shared_base;
  p.program.register_bytes = (p.program.register_bytes + 127) / 128 * 128;
  auto& marked = p.program.wgmma_register;
  marked.resize(p.program.register_bytes / 128);
  for (Inst& i : p.program.code)
    if (i.kind != WGMMA)
      for (u32 k = 0; k < i.ops; ++k) i.wgmma_registers |= i.op[k].at / 128 < marked.size() && marked[i.op[k].at / 128];
  return std::move(p.program);
}

}  // namespace ptx
